"""Triton kernels for every GPU with native FP8 dots: activations quantised per token, MXFP8 or block FP8 weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar

import torch

from epfuse.config import ACTIVATIONS, Activation, Bias, Combine, Path, WeightFormat
from epfuse.families import blocks
from epfuse.families.family import CallKind, Family, LayerCall, Reads, Step, Steps
from epfuse.families.memory import fp8_rows_in, fp8_scratch, rows_in
from epfuse.scratch import ScratchSize
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.tiles import ANY, GemmTile, LayerTiles, TileRange
from epfuse.target import Target
from epfuse.weights.block_fp8 import scale_block


class PortableFP8(Family):
    """route -> quantize -> gate_up -> activate -> down -> combine."""

    name: ClassVar[str] = "portable_fp8"
    tile: ClassVar[type[GemmTile]] = GemmTile
    every_gpu: ClassVar[bool] = True
    activations: ClassVar[frozenset[type[Activation]]] = frozenset(ACTIVATIONS)
    biases: ClassVar[frozenset[Bias]] = frozenset(Bias)
    combines: ClassVar[frozenset[Combine]] = frozenset(Combine)
    reads: ClassVar[Reads] = {
        Target.SM90: {Path.W8A8: (WeightFormat.MXFP8,), Path.BLOCK_FP8: (WeightFormat.BLOCK_FP8,)},
        Target.GFX942: {Path.W8A8: (WeightFormat.MXFP8_FNUZ,), Path.BLOCK_FP8: (WeightFormat.BLOCK_FP8_FNUZ,)},
        Target.GFX950: {Path.W8A8: (WeightFormat.MXFP8,), Path.BLOCK_FP8: (WeightFormat.BLOCK_FP8,)},
    }

    def defaults(self, kind: CallKind) -> tuple[TileRange, ...]:
        """block_k is a multiple of both groups, 32 and 128."""
        return FP8_TILES[kind.target]

    def candidates(self, kind: CallKind, block_m: int, rows: float) -> Iterator[GemmTile]:
        """Whole groups of 128."""
        for block_n, group_m, warps, stages in itertools.product(
            (64, 128, 256), blocks.groups(block_m), (2, 4, 8), (2,) if kind.target.is_amd else (3, 4)
        ):
            if block_m * block_n <= 128 * 128:
                yield GemmTile(block_n, 128, group_m, warps, stages)

    def scratch(self, tokens: int, top_k: int, hidden: int, intermediate: int) -> ScratchSize:
        """FP8 rows in y; rows before and after each GEMM in routed."""
        return fp8_scratch(tokens, top_k, hidden, intermediate)

    def steps(self, call: LayerCall, tiles: LayerTiles) -> Steps:
        """With a caller's scratch x is dead when y is written, and gate_up when routed is."""
        from epfuse.stages.activate.launch import launch_activate
        from epfuse.stages.combine.launch import launch_combine
        from epfuse.stages.down.launch_fp8 import launch_down_fp8
        from epfuse.stages.gate_up.launch_fp8 import launch_gate_up_fp8
        from epfuse.stages.quantize.launch import launch_quantize
        from epfuse.stages.route.launch import launch_route

        hidden, shape, scratch = call.hidden, call.shape, call.scratch
        group, values = scale_block(call.w13)[1], call.w13.values.dtype
        (tokens, top_k), rows, device = call.topk_ids.shape, call.routes, hidden.device
        atomic, outputs = call.combine is Combine.ATOMIC, call.activation.inputs * shape.intermediate
        if scratch is None:
            x = FP8Rows.empty(tokens, shape.hidden, group, values, device)
            y = FP8Rows.empty(rows, shape.intermediate, group, values, device)
            gate_up = hidden.new_empty(rows, outputs)
        else:
            x = fp8_rows_in(scratch.y, tokens, shape.hidden, group, values)
            y = fp8_rows_in(scratch.y, rows, shape.intermediate, group, values)
            gate_up = rows_in(scratch.routed, rows, outputs)
        if atomic:
            routed = torch.empty(hidden.shape, dtype=torch.float32, device=device)
        elif scratch is None:
            routed = hidden.new_empty(rows, shape.hidden)
        else:
            routed = rows_in(scratch.routed, rows, shape.hidden)
        table = call.table(tiles.block_m)
        first = (
            x,
            call.w13,
            table,
            top_k,
            tiles.gate_up,
            gate_up,
            call.gate_up_bias,
            call.activation.inputs,
        )
        second = (y, call.w2, table, call.topk_weights, tiles.down, call.combine, routed, call.down_bias)
        down = partial(launch_down_fp8, *second)
        summed = partial(launch_combine, routed, call.topk_ids, call.slots, shape.local_experts, call.out)
        launches: tuple[Step, ...] = (
            ("route", partial(launch_route, call.topk_ids, call.slots, call.shape.local_experts, table)),
            ("quantize", partial(launch_quantize, hidden, group, dtype=values, out=x)),
            ("gate_up", partial(launch_gate_up_fp8, *first)),
            ("activate", partial(launch_activate, gate_up, table, call.activation, y)),
            ("down", partial(_add_up, routed, down) if atomic else down),
            ("combine", partial(_round, routed, call.out) if atomic else summed),
        )
        return Steps(table, launches)


def _add_up(sums: torch.Tensor, down: Callable[[], object]) -> None:
    """``down`` adds to ``sums``, from zero."""
    sums.zero_()
    down()


def _round(sums: torch.Tensor, out: torch.Tensor) -> None:
    with torch.inference_mode():  # out may be made in it, and then is written in it alone
        out.copy_(sums)


# From the compiler's resources (registers, shared memory), not measured. A group's sum and the accumulators both live
# in registers: a tile has at most 64 of each a lane.
_AMD = (
    # two waves: with four, a lane would load 8 bytes of the weights' 32-column groups at a time, not 16
    TileRange(12, LayerTiles.both(16, GemmTile(64, 128, 0, 2, 2))),
    TileRange(48, LayerTiles.both(32, GemmTile(128, 128, 0, 4, 2))),
    TileRange(ANY, LayerTiles.both(64, GemmTile(128, 128, 8, 4, 2))),
)
FP8_TILES: dict[Target, tuple[TileRange, ...]] = {
    Target.SM90: (
        TileRange(12, LayerTiles.both(16, GemmTile(128, 128, 0, 4, 4))),
        TileRange(20, LayerTiles.both(32, GemmTile(128, 128, 0, 4, 4))),
        TileRange(48, LayerTiles.both(64, GemmTile(128, 128, 0, 4, 3))),
        TileRange(ANY, LayerTiles.both(128, GemmTile(128, 128, 8, 8, 3))),
    ),
    Target.GFX942: _AMD,
    Target.GFX950: _AMD,
}

PORTABLE_FP8 = PortableFP8()
