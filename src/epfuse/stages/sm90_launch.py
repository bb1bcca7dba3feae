"""What the launches of both Hopper GEMMs share."""

from __future__ import annotations

import functools
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from epfuse.errors import ConfigError
from epfuse.hardware.tile_time import resident
from epfuse.stages.grid import pieces
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import FEW_ROWS, Sm90BlockTile, Sm90PersistentTile, Sm90Tile
from epfuse.target import compute_units
from epfuse.weights.block_fp8 import BLOCK, BlockFP8
from epfuse.weights.fragment import FragmentMXFP8
from epfuse.weights.panels import PANEL_ROWS, STEP_K
from epfuse.weights.row_fp8 import RowFP8

LINE = 128
"""Bytes of a line of weights: the tensor copy engine's widest swizzle."""


class WeightOperand(NamedTuple):
    """Weights as the kernels take them.

    Attributes:
        weights: codes in fragment order or packed by rows, uint8, or block FP8 or dense weights as they are.
        scales: int32 scale words of fragments, a float32 for each row or block otherwise; None if dense.
        columns: K of the weights in whole steps; packed codes have them all, of other weights the last is cut short.
        panels: panels of 64 rows of one expert.
    """

    weights: torch.Tensor
    scales: torch.Tensor | None
    columns: int
    panels: int


def operand_of(stack: torch.Tensor | FragmentMXFP8 | RowFP8 | BlockFP8, rows: int, block_k: int) -> WeightOperand:
    """``stack`` as the kernels take it; ``rows`` of an expert's matrix, in steps of ``block_k`` columns."""
    if isinstance(stack, FragmentMXFP8):
        return WeightOperand(stack.codes, stack.scales, stack.padded_columns, stack.panels)
    if isinstance(stack, RowFP8):
        return WeightOperand(stack.codes.view(torch.uint8), stack.scales, stack.steps * STEP_K, stack.panels)
    values, scales = (stack.values, stack.scales) if isinstance(stack, BlockFP8) else (stack, None)
    return WeightOperand(values, scales, pieces(values.shape[2], block_k) * block_k, pieces(rows, PANEL_ROWS))


def row_tiles(operand: WeightOperand, routes: RouteTable, tile: Sm90Tile) -> int:
    """The most tiles that a call can have."""
    return routes.max_blocks * pieces(operand.panels * PANEL_ROWS, tile.block_n)


def constants(routes: RouteTable, tile: Sm90Tile | Sm90PersistentTile) -> dict[str, Any]:
    """Compile-time arguments and launch options that both kinds of kernels have."""
    return {
        "BLOCK_M": routes.block_m,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "STAGES": tile.num_stages,
        "num_warps": tile.num_warps,
        "launch_pdl": True,
    }


def shared_sums(
    tile: Sm90Tile, tiles: int, places: int, routes: RouteTable, arrivals: slice
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Memory of the shares of ``tiles`` reductions, and this GEMM's part of the arrival counters; None if not split."""
    if tile.shares == 1:
        return None, None
    assert routes.arrivals is not None
    shared = tiles if tile.split_k > 1 else in_tail(tile, tiles, places)
    numbers = shared * tile.shares * tile.block_n * routes.block_m
    shares = torch.empty(numbers, dtype=torch.float32, device=routes.num_padded.device)
    return shares, routes.arrivals[arrivals]


def places_of(tile: Sm90Tile, block_m: int, device: torch.device) -> int:
    """Programs that run at once, as far as shared memory and registers say: the tail begins after their last wave."""
    return compute_units(device) * resident(tile, block_m)


def in_tail(tile: Sm90Tile, tiles: int, places: int) -> int:
    """The most of ``tiles`` tiles that come after the last full wave of ``places`` programs; 0 if none are shared."""
    return min(tiles, places - 1) if tile.tail_split > 1 else 0


def programs_of(tile: Sm90Tile, tiles: int, places: int) -> int:
    """The most programs that ``tiles`` tiles take."""
    return tiles * tile.split_k + in_tail(tile, tiles, places) * (tile.tail_split - 1)


def check_fp8_tile(tile: Sm90PersistentTile) -> None:
    """Refuse what the kernels of FP8 rows have no code for.

    Raises:
        ConfigError: block_k is not 128, or parts is not 1.
    """
    if (tile.block_k, tile.parts) != (STEP_K, 1):
        raise ConfigError(
            f"tile {tile.key} has block_k {tile.block_k} and {tile.parts} parts; with one scale a row it must have"
            f" block_k {STEP_K} and 1 part"
        )


def row_parts(rows: torch.Tensor, head: int, rest: int, block_k: int) -> list[TensorDescriptor | None]:
    """``rows [R, K]`` as the copy engine takes a block's head, a few of its rest and all of it, ``block_k`` at a time.

    None for what no block needs.
    """
    parts = (head, FEW_ROWS if rest > FEW_ROWS else 0, rest)
    layout = _line_layout(8 * rows.element_size())
    return [TensorDescriptor.from_tensor(rows, [part, block_k], layout) if part else None for part in parts]


def weight_lines(weights: FragmentMXFP8 | RowFP8, block_k: int) -> TensorDescriptor:
    """The codes as lines of 128 bytes, copied a panel and ``block_k`` at a time; described once in their life."""
    codes = weights.codes
    known = _lines.setdefault(codes, {})
    found = known.get(block_k)
    if found is None or found.base.data_ptr() != codes.data_ptr():  # a tensor can be given other memory
        box = [PANEL_ROWS * block_k // LINE, LINE]
        # detached: a view holds the tensor that it is of, which would never be forgotten then
        lines = codes.detach().view(-1, LINE)
        known[block_k] = found = TensorDescriptor.from_tensor(lines, box, _line_layout(8))
    return found


def block_constants(routes: RouteTable, tile: Sm90BlockTile) -> dict[str, Any]:
    """Compile-time arguments and launch options of both GEMMs with block FP8 weights."""
    return {
        "BLOCK_M": routes.block_m,
        "BLOCKS": tile.blocks,
        "GROUP_M": tile.group_m,
        "STAGES": tile.num_stages,
        "num_warps": tile.num_warps,
        "launch_pdl": True,
    }


def weight_blocks(weights: BlockFP8) -> TensorDescriptor:
    """The values as ``[L * N, K]``, copied 128x128 at a time; described once in their life."""
    values = weights.values
    known = _blocks.get(values)
    if known is None or known.base.data_ptr() != values.data_ptr():
        rows = values.detach().flatten(0, 1)
        known = _blocks[values] = TensorDescriptor.from_tensor(rows, [BLOCK, BLOCK], _line_layout(8))
    return known


def block_rows(rows: FP8Rows, block_m: int) -> TensorDescriptor:
    """``rows [R, K]`` as the copy engine takes a consumer's of a block, 128 columns at a time."""
    return TensorDescriptor.from_tensor(rows.values, [min(block_m, PANEL_ROWS), BLOCK], _line_layout(8))


_blocks: MutableMapping[torch.Tensor, TensorDescriptor] = WeakIdKeyDictionary()
_lines: MutableMapping[torch.Tensor, dict[int, TensorDescriptor]] = WeakIdKeyDictionary()
_line_layout = functools.cache(lambda bits: gl.NVMMASharedLayout(LINE, bits, 2))
"""Checking either anew takes the host some microseconds a launch."""
