"""Gluon kernels for Hopper and few rows an expert: several programs share a multiprocessor.

Weights are on the M side of wgmma, so that routed rows come in steps of 8.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch

from epfuse.config import Bias, LayerShape, Path, WeightFormat
from epfuse.errors import LayoutError
from epfuse.families import blocks
from epfuse.families.family import CallKind, LayerCall, Reads, Steps
from epfuse.families.portable import DENSE_TILES as PORTABLE_TILES
from epfuse.families.portable import PORTABLE
from epfuse.families.two_gemms import TwoGemms
from epfuse.stages.extent import ALIGNMENT
from epfuse.stages.tiles import GemmTile, LayerTiles, Sm90Tile, TileRange, has_few_tiles
from epfuse.target import Target
from epfuse.weights.block_fp8 import BLOCK, BlockFP8

SPLIT_ROWS = 0.5
"""Rows per expert up to which too few experts are active to fill the GPU, and programs may share a reduction."""
FEW_TILES_END = 116.0
"""Rows an expert from which on layers with few tiles take the packed kernels."""
MOST_SHARED_ROWS, MOST_TAIL_ROWS = 128, 16
"""Rows of a block up to which programs may share a reduction: of every tile, and of those after the last full wave."""
SHORT_K = 512
"""I up to which a program of down has four steps at the most."""
SHORT_DOWN = Sm90Tile(128, 128, 0, 4, 3)
SHARED_BYTES = 232_448
"""Shared memory of a block on sm_90 (CUDA's programming guide, compute capability 9.0)."""
UNALIGNED = PORTABLE_TILES[Target.SM90][-1].tiles
"""Portable tiles of calls whose dense weights begin at no multiple of 16 bytes, which Hopper's copies want."""


def dense_is_aligned(call: LayerCall) -> bool:
    """Whether the call's dense weights begin at multiples of 16 bytes; packed ones do (`epfuse.weights.panels`)."""
    dense = [weights for weights in (call.w13, call.w2) if isinstance(weights, torch.Tensor)]
    return not any(weights.data_ptr() % ALIGNMENT for weights in dense)


def require_aligned_blocks(call: LayerCall) -> None:
    """Refuse block FP8 weights, which are read where they were loaded, that begin where nothing can be copied from.

    Raises:
        LayoutError: values begin at no multiple of 16 bytes.
    """
    for name, stack in (("w13", call.w13), ("w2", call.w2)):
        if isinstance(stack, BlockFP8) and (begin := stack.values.data_ptr()) % ALIGNMENT:
            raise LayoutError(
                f"block FP8 values of {name} begin at {begin:#x}; Hopper's kernels copy them from multiples of"
                f" {ALIGNMENT} bytes (call .clone() at load)"
            )


def why_no_blocks(shape: LayerShape) -> str | None:
    """Why Hopper's kernels don't read a layer's block FP8 weights, in a sentence; None if they do.

    Not where gate and up rows share a scale, rows of weights can't be copied, or are less than a step.
    """
    if shape.intermediate % BLOCK == 0 and shape.hidden % 16 == 0 and shape.hidden >= BLOCK:
        return None
    return (
        f"It takes block FP8 weights with I in multiples of {BLOCK} and H in multiples of 16, from {BLOCK} on,"
        f" not {shape.intermediate} and {shape.hidden}."
    )


def with_short_down(tiles: LayerTiles) -> LayerTiles:
    """With a tile of down for I of a few steps: a program with one or two takes as long to begin as to go through them.

    Measured with I 256 of DeepSeek-V3 on eight tensor-parallel ranks, on an H200 (docs/performance.md).
    """
    return LayerTiles(tiles.block_m, tiles.gate_up, SHORT_DOWN) if tiles.block_m == 8 else tiles


class Sm90(TwoGemms):
    """route -> gate_up -> down -> combine, on dense weights, MXFP8 in fragment order, FP8 by rows or by blocks.

    Activations are in BF16 here, for W8A8 and BLOCK_FP8 too: very few rows don't gain by FP8 products what quantising
    them costs.
    """

    name: ClassVar[str] = "sm90"
    tile: ClassVar[type[GemmTile]] = Sm90Tile
    biases: ClassVar[frozenset[Bias]] = frozenset(Bias)
    least_block_m: ClassVar[int] = 8
    reads: ClassVar[Reads] = {
        Target.SM90: {
            Path.W8A16: (WeightFormat.FRAGMENT,),
            Path.W8A8: (WeightFormat.ROW_FP8,),
            Path.BF16: (WeightFormat.DENSE,),
            Path.BLOCK_FP8: (WeightFormat.BLOCK_FP8,),
        },
    }

    def accepts(self, kind: CallKind) -> str | None:
        """Dense rows that begin at multiples of 32 bytes, block FP8 of whole blocks, and BF16."""
        if (refusal := super().accepts(kind)) is not None:
            return refusal
        shape, dtype = kind.shape, kind.dtype
        if kind.form is WeightFormat.DENSE and (shape.hidden % 16 or shape.intermediate % 16):
            return (
                f"It takes dense weights with H and I in multiples of 16, not {shape.hidden} and {shape.intermediate}."
            )
        if dtype != torch.bfloat16:
            return f"It takes BF16 activations, not {str(dtype).removeprefix('torch.')}."
        return why_no_blocks(shape) if kind.form is WeightFormat.BLOCK_FP8 else None

    def defaults(self, kind: CallKind) -> tuple[TileRange, ...]:
        """Measured on an H100; on an H200 with one scale a row or a block, and where few experts have two rows."""
        ranges = TILES[kind.form]
        if kind.form is WeightFormat.FRAGMENT and has_few_tiles(kind.shape):
            return FEW_TILES
        if kind.form is WeightFormat.FRAGMENT and kind.shape.intermediate <= SHORT_K:
            return tuple(TileRange(entry.max_rows, with_short_down(entry.tiles)) for entry in ranges)
        return ranges

    def candidates(self, kind: CallKind, block_m: int, rows: float) -> Iterator[GemmTile]:
        """Rings that fit shared memory; shared reductions where there are few rows."""
        if block_m.bit_count() > 1:
            return
        alone, shared, tail = ((1, 1),), ((2, 1), (4, 1), (8, 1)), ((1, 4),)  # split_k and tail_split
        is_shared = rows <= SPLIT_ROWS or (has_few_tiles(kind.shape) and block_m <= MOST_SHARED_ROWS)
        splits = alone + (shared if is_shared else ()) + (tail if block_m == self.least_block_m else ())
        for block_k, (block_n, warps), group_m, stages, (split_k, tail_split) in itertools.product(
            (64, 128) if kind.form is WeightFormat.DENSE and block_m >= 64 else (128,),
            ((64, 4), (128, 4), (128, 8), (256, 8)),
            blocks.groups(block_m),
            (2, 3, 4, 5),
            splits,
        ):
            tile = Sm90Tile(block_n, block_k, group_m, warps, stages, split_k=split_k, tail_split=tail_split)
            if ring_fits(tile, kind.form, block_m):
                yield tile

    def fits(self, tile: GemmTile, form: WeightFormat, block_m: int) -> bool:
        """Where blocks have more rows, tiles are enough: no reduction is shared."""
        assert isinstance(tile, Sm90Tile)
        most = MOST_SHARED_ROWS if tile.split_k > 1 else MOST_TAIL_ROWS
        shared = tile.shares > 1 and block_m > most
        return block_m.bit_count() == 1 and not shared and ring_fits(tile, form, block_m)

    def steps(self, call: LayerCall, tiles: LayerTiles) -> Steps:
        """As of two GEMMs; dense weights that begin anywhere go to the kernels for every GPU."""
        require_aligned_blocks(call)
        return super().steps(call, tiles) if dense_is_aligned(call) else PORTABLE.steps(call, UNALIGNED)

    def gemms(self) -> tuple[Callable[..., object], Callable[..., object]]:
        """For Hopper."""
        from epfuse.stages.down.launch_sm90 import launch_down_sm90
        from epfuse.stages.gate_up.launch_sm90 import launch_gate_up_sm90

        return launch_gate_up_sm90, launch_down_sm90


def ring_fits(tile: Sm90Tile, form: WeightFormat, block_m: int) -> bool:
    """Whether the ring fits shared memory, and the tile is not wasted on few rows."""
    bytes_of_weight = 2 if form is WeightFormat.DENSE else 1
    ring = tile.num_stages * tile.block_k * (tile.block_n * bytes_of_weight + block_m * 2)
    # a column of 256 weight rows leaves one program a multiprocessor, and too few of them for few rows
    return ring <= SHARED_BYTES and not (tile.block_n == 256 and block_m < 32)


# Measured on an H100 (docs/performance.md). From 6 rows on blocks of 32: 0.6 % slower than 16 where rows are spread
# evenly, and 1.7 times as fast where all tokens are on two experts. From 44 rows on the packed kernels take over.
FRAGMENT_TILES = (
    TileRange(0.1, LayerTiles(8, Sm90Tile(64, 128, 0, 4, 3, split_k=8), Sm90Tile(64, 128, 0, 4, 3, split_k=8))),
    TileRange(0.3, LayerTiles(8, Sm90Tile(64, 128, 0, 4, 4, split_k=2), Sm90Tile(64, 128, 0, 4, 4, split_k=2))),
    TileRange(0.75, LayerTiles(8, Sm90Tile(64, 128, 0, 4, 4), Sm90Tile(128, 128, 0, 8, 5))),
    TileRange(2, LayerTiles.both(8, Sm90Tile(64, 128, 0, 4, 3, tail_split=4))),  # on an H200
    TileRange(6, LayerTiles(16, Sm90Tile(64, 128, 0, 4, 4, guess_bytes=512), Sm90Tile(128, 128, 0, 4, 3))),
    TileRange(20, LayerTiles(32, Sm90Tile(128, 128, 0, 4, 3, guess_bytes=512), Sm90Tile(128, 128, 0, 4, 3))),
    TileRange(44, LayerTiles(64, Sm90Tile(128, 128, 4, 8, 3, guess_bytes=512), Sm90Tile(128, 128, 4, 8, 3))),
)
# Measured on an H200 (docs/performance.md, "One expert or two"), of layers with few tiles.
FEW_TILES = (
    TileRange(4, LayerTiles(8, Sm90Tile(128, 128, 0, 4, 3, split_k=4), Sm90Tile(64, 128, 0, 4, 3, split_k=8))),
    TileRange(12.5, LayerTiles(16, Sm90Tile(128, 128, 0, 8, 3, split_k=4), Sm90Tile(64, 128, 0, 4, 3, split_k=8))),
    TileRange(24, LayerTiles(32, Sm90Tile(64, 128, 0, 4, 4, split_k=2), Sm90Tile(64, 128, 0, 4, 4, split_k=4))),
    TileRange(64, LayerTiles(64, Sm90Tile(64, 128, 0, 4, 3), Sm90Tile(64, 128, 0, 4, 3, split_k=4))),
    TileRange(FEW_TILES_END, LayerTiles(128, Sm90Tile(128, 128, 0, 8, 3), Sm90Tile(128, 128, 0, 8, 3, split_k=4))),
)
# Measured on an H200 (docs/performance.md). With more rows FP8 products are faster, though rows are quantised for them.
ROW_FP8_TILES = (TileRange(0.1, LayerTiles.both(8, Sm90Tile(64, 128, 0, 4, 3, split_k=4))),)
BLOCK_FP8_TILES = (TileRange(0.125, LayerTiles.both(8, Sm90Tile(128, 128, 0, 4, 3, split_k=4))),)
DENSE_TILES = (
    TileRange(1.5, LayerTiles(8, Sm90Tile(64, 128, 0, 4, 4), Sm90Tile(64, 128, 0, 4, 4))),
    TileRange(4, LayerTiles(16, Sm90Tile(64, 128, 0, 4, 4), Sm90Tile(64, 128, 0, 4, 4))),
    TileRange(12, LayerTiles(16, Sm90Tile(128, 128, 0, 4, 3, guess_bytes=512), Sm90Tile(128, 128, 0, 4, 3))),
    TileRange(20, LayerTiles(32, Sm90Tile(128, 128, 0, 4, 3, guess_bytes=512), Sm90Tile(64, 128, 0, 4, 4))),
    TileRange(44, LayerTiles(64, Sm90Tile(128, 128, 4, 8, 2, guess_bytes=1024), Sm90Tile(128, 128, 4, 8, 2))),
)
TILES = {
    WeightFormat.FRAGMENT: FRAGMENT_TILES,
    WeightFormat.ROW_FP8: ROW_FP8_TILES,
    WeightFormat.BLOCK_FP8: BLOCK_FP8_TILES,
    WeightFormat.DENSE: DENSE_TILES,
}

SM90 = Sm90()
