"""Gluon kernels for Hopper with FP8 products and hundreds of rows an expert: one scale a row, rows packed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar

import torch

from epfuse.config import Bias, Path, WeightFormat
from epfuse.families.family import CallKind, Family, LayerCall, Reads, Stage, Step, Steps
from epfuse.families.memory import fp8_rows_in, fp8_scratch, rows_in
from epfuse.families.sm90 import SHARED_BYTES
from epfuse.families.sm90_fp8 import each_gemm
from epfuse.operands import overlaps
from epfuse.scratch import ScratchSize
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.route.table import LoneTokens
from epfuse.stages.tiles import ANY, GemmTile, LayerTiles, Sm90RowsTile, TileRange
from epfuse.target import Target

BLOCK_M = 128


class Sm90FP8Rows(Family):
    """route -> quantize -> gate_up_down -> combine; gate_up -> activate -> down where nothing bounds the activation."""

    name: ClassVar[str] = "sm90_fp8_rows"
    tile: ClassVar[type[GemmTile]] = Sm90RowsTile
    biases: ClassVar[frozenset[Bias]] = frozenset(Bias)
    least_block_m: ClassVar[int] = BLOCK_M
    reads: ClassVar[Reads] = {Target.SM90: {Path.W8A8: (WeightFormat.ROW_FP8,)}}

    def accepts(self, kind: CallKind) -> str | None:
        """K of both GEMMs in whole pairs of steps of 128."""
        if (refusal := super().accepts(kind)) is not None:
            return refusal
        shape = kind.shape
        if any(size < 128 or -(-size // 128) % 2 for size in (shape.hidden, shape.intermediate)):
            return (
                f"It takes H and I that are an even number of steps of 128, the last of them cut short or not; not"
                f" {shape.hidden} and {shape.intermediate}."
            )
        return None

    def defaults(self, kind: CallKind) -> tuple[TileRange, ...]:
        """Measured on an H200; for more rows than `sm90_fp8` has a range for. With biases none: down would spill."""
        return MANY_ROWS_TILES if kind.bias is Bias.NONE else ()

    def block_ms(self, rows: float) -> list[int]:
        """One size, and none for few rows."""
        return [BLOCK_M] if rows > BLOCK_M // 2 else []

    def candidates(self, kind: CallKind, block_m: int, rows: float) -> Iterator[GemmTile]:
        """Rings that fit."""
        for group_m, stages in itertools.product((0, 1, 2, 4, 8), (3, 4)):
            tile = Sm90RowsTile(256, 128, group_m, 4, stages)
            if self.fits(tile, kind.form, block_m):
                yield tile

    def fits(self, tile: GemmTile, form: WeightFormat, block_m: int) -> bool:
        """Whether the ring has room beside a consumer's results."""
        return (
            block_m == BLOCK_M and tile.num_stages * tile.block_k * (tile.block_n + block_m) + (1 << 14) <= SHARED_BYTES
        )

    def scratch(self, tokens: int, top_k: int, hidden: int, intermediate: int) -> ScratchSize:
        """FP8 rows of the second GEMM in y, and the scales of both; rows before and after each GEMM in routed."""
        size, rows = fp8_scratch(tokens, top_k, hidden, intermediate), tokens * top_k
        return ScratchSize(max(size.y, -(-rows * intermediate // 2) + _aligned(rows)), size.routed)

    def steps(self, call: LayerCall, tiles: LayerTiles) -> Steps:
        """Both GEMMs in one launch where a bound of what lies between is known before; else one each."""
        from epfuse.stages.gate_up_down.launch_sm90_fp8_rows import launch_both, launch_down, launch_gate_up

        if bounded(call):
            return both_gemms(call, tiles, launch_both)
        return each_gemm(call, tiles, launch_gate_up, partial(launch_down, activation=call.activation))

    def step_of(self, stage: Stage, tiles: LayerTiles) -> str:
        """As `steps`, of a bounded activation."""
        return "gate_up_down"


def _aligned(scales: int) -> int:
    """Bytes of so many scales where what follows begins at a multiple of 16 bytes, as the scales do."""
    return -(-scales // 16) * 16


def bounded(call: LayerCall) -> bool:
    """Whether the scales of the rows between the GEMMs are known before those rows are."""
    return call.activation.bounded and call.gate_up_bias is None


def both_gemms(call: LayerCall, tiles: LayerTiles, launch: Callable[..., object]) -> Steps:
    """A row of x begins where that of routed will: it is dead when down writes there.

    Args:
        call: `bounded`.
        tiles: one of them is for both GEMMs.
        launch: as `launch_both`.
    """
    from epfuse.stages.combine.launch import launch_combine
    from epfuse.stages.quantize.launch_packed import Bounds, launch_quantize_packed
    from epfuse.stages.route.launch import launch_route

    shape, slots, scratch = call.shape, call.slots, call.scratch
    rows, size, between = call.routes, shape.hidden, shape.intermediate
    fp8 = torch.float8_e4m3fn
    if scratch is None:
        routed, scales = call.hidden.new_empty(rows, size), slots.new_empty(rows, 1, dtype=torch.uint8)
        y = FP8Rows.empty(rows, between, between, fp8, call.hidden.device)
    else:
        routed, y = rows_in(scratch.routed, rows, size), fp8_rows_in(scratch.y, rows, between, between, fp8)
        behind = scratch.y.view(-1).view(torch.uint8)[rows * between + _aligned(rows) :]  # y's values and scales
        scales = behind[:rows].view(rows, 1)
    x = FP8Rows(routed.view(fp8)[:, :size], scales, size)
    # a caller's scratch may have out's memory for y, which is in use until down has finished
    out_is_free = scratch is None or not overlaps(scratch.y, call.out)
    lone = LoneTokens.of(call.topk_ids, slots, shape.local_experts, call.out, out_is_free)
    route_row = slots.new_empty(rows)
    table = call.table(tiles.block_m, tiles.arrivals(size, between))
    # down alone runs on rows that are there
    bounds = None if call.w13 is None else Bounds(call.w13.longest, call.activation, y.scales)
    experts = (call.w13, call.w2, table, call.topk_weights, call.activation, tiles.gate_up)
    gemms = partial(launch, x, *experts, y, routed, lone, call.down_bias)
    summed = (routed, call.topk_ids, slots, shape.local_experts, call.out, route_row)
    launches: tuple[Step, ...] = (
        ("route", partial(launch_route, call.topk_ids, slots, shape.local_experts, table)),
        ("quantize", partial(launch_quantize_packed, call.hidden, table, shape.top_k, x, route_row, lone, bounds)),
        ("gate_up_down", gemms),
        ("combine", partial(launch_combine, *summed, out_is_free=out_is_free)),
    )
    return Steps(table, launches)


# Measured on an H200 (docs/performance.md).
MANY_ROWS_TILES = (TileRange(ANY, LayerTiles.both(BLOCK_M, Sm90RowsTile(256, 128, 4, 4, 4))),)

SM90_FP8_ROWS = Sm90FP8Rows()
