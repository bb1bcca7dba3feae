"""Gluon kernels for Hopper with FP8 products: weights and activations with one scale a row, rows packed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar

import torch

from epfuse.config import Bias, Path, WeightFormat
from epfuse.families import blocks
from epfuse.families.family import CallKind, Family, LayerCall, Reads, Step, Steps
from epfuse.families.memory import fp8_rows_in, fp8_scratch, rows_in
from epfuse.families.sm90 import SHARED_BYTES
from epfuse.families.sm90_packed import TWO_PARTS
from epfuse.operands import overlaps
from epfuse.scratch import ScratchSize
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.route.table import LoneTokens
from epfuse.stages.tiles import ANY, GemmTile, LayerTiles, Sm90PersistentTile, TileRange
from epfuse.target import Target

MOST_ROWS = {128: 288, 192: 144}
"""Rows of a block that the registers hold, by block_n: a step's sums stand beside the sums of all
(of 256 rows in halves).

No table has blocks of more than 192 yet.
"""
MANY_ROWS = 144
"""Expected rows of an expert up to which this family runs: of 128, where it is faster, and 160 the middle."""


class Sm90FP8(Family):
    """route -> quantize -> gate_up -> activate -> down -> combine; activate only quantises the rows of gate_up."""

    name: ClassVar[str] = "sm90_fp8"
    tile: ClassVar[type[GemmTile]] = Sm90PersistentTile
    biases: ClassVar[frozenset[Bias]] = frozenset(Bias)
    reads: ClassVar[Reads] = {Target.SM90: {Path.W8A8: (WeightFormat.ROW_FP8,)}}

    def defaults(self, kind: CallKind) -> tuple[TileRange, ...]:
        """Measured on an H100; up to 12 rows on an H200."""
        return ROW_FP8_TILES

    def block_ms(self, rows: float) -> list[int]:
        """Two powers of two, or one."""
        sizes = [size for size in blocks.two_parts(rows, TWO_PARTS) if size <= max(MOST_ROWS.values())]
        return sorted({*blocks.powers_of_two(rows, self.least_block_m), *sizes})

    def candidates(self, kind: CallKind, block_m: int, rows: float) -> Iterator[GemmTile]:
        """Rings that fit, with two or three consumers."""
        for block_n, group_m, stages, head in itertools.product(
            (128, 192), (0, 1, 2, 4), (4, 5, 6, 8), blocks.HEADS.get(block_m, (0,))
        ):
            tile = Sm90PersistentTile(block_n, 128, group_m, 4, stages, parts=1, head=head)
            if self.fits(tile, kind.form, block_m):
                yield tile

    def fits(self, tile: GemmTile, form: WeightFormat, block_m: int) -> bool:
        """Whether the block can be cut so, and the ring and the sums have room."""
        assert isinstance(tile, Sm90PersistentTile)
        ring = tile.num_stages * tile.block_k * (tile.block_n + block_m)
        return tile.cuts(block_m) and tile.parts == 1 and ring <= SHARED_BYTES and block_m <= MOST_ROWS[tile.block_n]

    def scratch(self, tokens: int, top_k: int, hidden: int, intermediate: int) -> ScratchSize:
        """FP8 rows in y; rows before and after each GEMM in routed."""
        return fp8_scratch(tokens, top_k, hidden, intermediate)

    def steps(self, call: LayerCall, tiles: LayerTiles) -> Steps:
        """A launch of each GEMM."""
        from epfuse.stages.down.launch_sm90_fp8 import launch_down_sm90_fp8
        from epfuse.stages.gate_up.launch_sm90_fp8 import launch_gate_up_sm90_fp8

        return each_gemm(call, tiles, launch_gate_up_sm90_fp8, launch_down_sm90_fp8)


def each_gemm(
    call: LayerCall, tiles: LayerTiles, launch_gate_up: Callable[..., object], launch_down: Callable[..., object]
) -> Steps:
    """With a caller's scratch x and activated lie where routed will be: both are dead when down begins.

    Args:
        call: of any activation.
        tiles: of both GEMMs.
        launch_gate_up: as `launch_gate_up_sm90_fp8`.
        launch_down: as `launch_down_sm90_fp8`.
    """
    from epfuse.stages.combine.launch import launch_combine
    from epfuse.stages.quantize.launch_packed import launch_quantize_packed
    from epfuse.stages.route.launch import launch_route

    shape, slots, scratch, tile = call.shape, call.slots, call.scratch, tiles.gate_up
    rows, size, between = call.routes, shape.hidden, shape.intermediate
    fp8, device = torch.float8_e4m3fn, call.hidden.device
    if scratch is None:
        x, y = FP8Rows.empty(rows, size, size, fp8, device), FP8Rows.empty(rows, between, between, fp8, device)
        activated, routed = call.hidden.new_empty(rows, between), call.hidden.new_empty(rows, size)
    else:  # the scales of x are dead when y's values are written to their place
        memory = scratch.routed.view(-1).view(torch.uint8)
        values = memory[: rows * size].view(fp8).view(rows, size)
        x = FP8Rows(values, scratch.y.view(-1).view(torch.uint8)[:rows].view(rows, 1), size)
        activated = rows_in(scratch.routed.view(-1)[rows * size // 2 :], rows, between)
        y, routed = fp8_rows_in(scratch.y, rows, between, between, fp8), rows_in(scratch.routed, rows, size)
    # a caller's scratch may have out's memory for y, which is in use until down has finished
    out_is_free = scratch is None or not overlaps(scratch.y, call.out)
    lone = LoneTokens.of(call.topk_ids, slots, shape.local_experts, call.out, out_is_free)
    route_row = slots.new_empty(rows)
    table = call.table(tiles.block_m, tiles.arrivals(size, between))
    first = (x, call.w13, table, call.activation, tile, activated, call.gate_up_bias)
    second = (y, call.w2, table, call.topk_weights, tile, routed, lone, call.down_bias)
    summed = (routed, call.topk_ids, slots, shape.local_experts, call.out, route_row)
    launches: tuple[Step, ...] = (
        ("route", partial(launch_route, call.topk_ids, slots, shape.local_experts, table)),
        ("quantize", partial(launch_quantize_packed, call.hidden, table, shape.top_k, x, route_row, lone)),
        ("gate_up", partial(launch_gate_up, *first)),
        ("activate", partial(launch_quantize_packed, activated, table, None, y)),
        ("down", partial(launch_down, *second)),
        ("combine", partial(launch_combine, *summed, out_is_free=out_is_free)),
    )
    return Steps(table, launches)


# Measured on an H100, up to 12 rows on an H200 (docs/performance.md). There and from 44 rows on two consumers: smaller
# tiles leave less of the GPU idle at the end of a launch.
ROW_FP8_TILES = (
    TileRange(12, LayerTiles.both(16, Sm90PersistentTile(128, 128, 0, 4, 8, 1))),
    TileRange(24, LayerTiles.both(32, Sm90PersistentTile(192, 128, 0, 4, 5, 1))),
    TileRange(44, LayerTiles.both(96, Sm90PersistentTile(192, 128, 2, 4, 5, 1, head=32))),
    TileRange(72, LayerTiles.both(96, Sm90PersistentTile(128, 128, 2, 4, 6, 1))),
    TileRange(MANY_ROWS, LayerTiles.both(160, Sm90PersistentTile(128, 128, 2, 4, 5, 1))),
    TileRange(ANY, LayerTiles.both(160, Sm90PersistentTile(128, 128, 2, 4, 5, 1))),  # where sm90_fp8_rows has no code
)

SM90_FP8 = Sm90FP8()
