"""Gluon kernels for Hopper with FP8 products on block FP8 weights as checkpoints have them; rows packed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import torch

from epfuse.config import Bias, Path, WeightFormat
from epfuse.families.family import CallKind, Family, LayerCall, Reads, Step, Steps
from epfuse.families.memory import fp8_rows_in, fp8_scratch, rows_in
from epfuse.families.sm90 import SHARED_BYTES, require_aligned_blocks, why_no_blocks
from epfuse.operands import overlaps
from epfuse.scratch import ScratchSize
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.route.table import LoneTokens
from epfuse.stages.tiles import ANY, GemmTile, LayerTiles, Sm90BlockTile, TileRange
from epfuse.target import Target
from epfuse.weights.block_fp8 import BLOCK


class Sm90BlockFP8(Family):
    """route -> quantize -> gate_up -> down -> combine; gate_up quantises its results, whose groups are in one tile."""

    name: ClassVar[str] = "sm90_block_fp8"
    tile: ClassVar[type[GemmTile]] = Sm90BlockTile
    biases: ClassVar[frozenset[Bias]] = frozenset(Bias)
    reads: ClassVar[Reads] = {Target.SM90: {Path.BLOCK_FP8: (WeightFormat.BLOCK_FP8,)}}

    def accepts(self, kind: CallKind) -> str | None:
        """As `why_no_blocks` says."""
        return super().accepts(kind) or why_no_blocks(kind.shape)

    def defaults(self, kind: CallKind) -> tuple[TileRange, ...]:
        """Measured on an H200."""
        return BLOCK_FP8_TILES

    def candidates(self, kind: CallKind, block_m: int, rows: float) -> Iterator[GemmTile]:
        """Rings that fit."""
        for group_m, stages in itertools.product((0, 2, 4, 8), (3, 4, 5, 6)):
            tile = Sm90BlockTile(2 * BLOCK, BLOCK, group_m, 4, stages)
            if self.fits(tile, kind.form, block_m):
                yield tile

    def fits(self, tile: GemmTile, form: WeightFormat, block_m: int) -> bool:
        """Whether the ring has room beside a consumer's results."""
        ring = tile.num_stages * tile.block_k * (tile.block_n + block_m)
        return block_m in (16, 32, 64, 128) and ring + 256 * block_m <= SHARED_BYTES

    def scratch(self, tokens: int, top_k: int, hidden: int, intermediate: int) -> ScratchSize:
        """FP8 rows of the second GEMM in y, those of the first and then its results in routed."""
        return fp8_scratch(tokens, top_k, hidden, intermediate)

    def steps(self, call: LayerCall, tiles: LayerTiles) -> Steps:
        """With a caller's scratch x lies where routed will be: it is dead when down begins."""
        from epfuse.stages.combine.launch import launch_combine
        from epfuse.stages.down.launch_sm90_block_fp8 import launch_down_sm90_block_fp8
        from epfuse.stages.gate_up.launch_sm90_block_fp8 import launch_gate_up_sm90_block_fp8
        from epfuse.stages.quantize.launch_packed import launch_quantize_packed
        from epfuse.stages.route.launch import launch_route

        require_aligned_blocks(call)
        shape, slots, scratch = call.shape, call.slots, call.scratch
        assert isinstance(tiles.gate_up, Sm90BlockTile)
        assert isinstance(tiles.down, Sm90BlockTile)
        rows, size, between = call.routes, shape.hidden, shape.intermediate
        fp8, device = torch.float8_e4m3fn, call.hidden.device
        if scratch is None:
            x, y = FP8Rows.empty(rows, size, BLOCK, fp8, device), FP8Rows.empty(rows, between, BLOCK, fp8, device)
            routed = call.hidden.new_empty(rows, size)
        else:
            x = fp8_rows_in(scratch.routed, rows, size, BLOCK, fp8)
            y, routed = fp8_rows_in(scratch.y, rows, between, BLOCK, fp8), rows_in(scratch.routed, rows, size)
        # a caller's scratch may have out's memory for y, which is in use until down has finished
        out_is_free = scratch is None or not overlaps(scratch.y, call.out)
        lone = LoneTokens.of(call.topk_ids, slots, shape.local_experts, call.out, out_is_free)
        route_row = slots.new_empty(rows)
        table = call.table(tiles.block_m, tiles.arrivals(size, between))
        first = (x, call.w13, table, call.activation, tiles.gate_up, y, call.gate_up_bias)
        second = (y, call.w2, table, call.topk_weights, tiles.down, routed, lone, call.down_bias)
        summed = (routed, call.topk_ids, slots, shape.local_experts, call.out, route_row)
        launches: tuple[Step, ...] = (
            ("route", partial(launch_route, call.topk_ids, slots, shape.local_experts, table)),
            ("quantize", partial(launch_quantize_packed, call.hidden, table, shape.top_k, x, route_row, lone)),
            ("gate_up", partial(launch_gate_up_sm90_block_fp8, *first)),
            ("down", partial(launch_down_sm90_block_fp8, *second)),
            ("combine", partial(launch_combine, *summed, out_is_free=out_is_free)),
        )
        return Steps(table, launches)


def _tiles(block_m: int, group_m: int, stages: int, down: int, down_stages: int) -> LayerTiles:
    return LayerTiles(
        block_m, Sm90BlockTile(256, BLOCK, group_m, 4, stages), Sm90BlockTile(down, BLOCK, group_m, 4, down_stages)
    )


# The best of nine on an H200 (docs/performance.md). Up to 32 rows weights stand on the M side of wgmma.
BLOCK_FP8_TILES = (
    TileRange(12, _tiles(16, 0, 6, 256, 6)),
    TileRange(24, _tiles(32, 0, 5, 256, 5)),
    TileRange(48, _tiles(64, 0, 5, 256, 5)),
    TileRange(ANY, _tiles(128, 4, 4, 256, 4)),
)

SM90_BLOCK_FP8 = Sm90BlockFP8()
