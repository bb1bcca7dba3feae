"""FlashInfer's two grouped BF16 products for Hopper, in the fastest of their tiles, with our routing before them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch

from epfuse.bench.contender import PEER_TOLERANCE, Contender, ContenderKind
from epfuse.bench.inputs import Inputs
from epfuse.bench.measure import Call, Sampling, TimingMethod, time_calls
from epfuse.bench.roofline import MatrixOperand
from epfuse.bench.weights import LayerWeights
from epfuse.config import SwiGLUOAI, WeightFormat
from epfuse.errors import ConfigError, MissingDependency

NAME = "FlashInfer"
BRIEF = Sampling(samples=3, seconds=0.002)

GateUpTile = tuple[int, int]
"""Columns, gate's and up's together, and how many blocks of rows share a pass over an expert's weights."""
DownTile = tuple[int, tuple[int, int]]
"""Columns, and the cluster of tiles, of which two share rows."""


class Tactic(NamedTuple):
    """A choice among FlashInfer's own: rows of a block, and the tiles of both products."""

    rows: int
    gate_up: GateUpTile
    down: DownTile


DEFAULT = Tactic(128, (64, 1), (64, (1, 1)))
"""What FlashInfer takes where nothing was tuned."""
ROWS = (64, 128)
GATE_UP: tuple[GateUpTile, ...] = tuple(product((256, 192, 128, 64), (1, 8, 16)))
DOWN: tuple[DownTile, ...] = tuple(product((256, 128, 64), ((1, 1), (1, 2))))


class GroupedCall:
    """One call's routes in blocks of so many rows, and both products over them.

    Args:
        rows: of a block.
        inputs: of the call.
        w13: ``[L, 2I, H]`` BF16, 32 rows of up and 32 of gate in turn.
        w2: ``[L, H, I]`` BF16.
        activation: between the products.
        out: ``[T, H]`` BF16; `down` adds to it.
    """

    def __init__(
        self, rows: int, inputs: Inputs, w13: torch.Tensor, w2: torch.Tensor, activation: SwiGLUOAI, out: torch.Tensor
    ) -> None:
        from flashinfer.fused_moe.cute_dsl.sm90_contiguous_gather_grouped_gemm_act_fusion import (
            sm90_contiguous_gather_grouped_gemm_act_fusion,
        )
        from flashinfer.fused_moe.cute_dsl.sm90_contiguous_grouped_gemm_finalize_fusion import (
            sm90_contiguous_grouped_gemm_finalize_fusion,
        )

        from epfuse.stages.route.table import RouteTable

        self._multiply_and_activate = sm90_contiguous_gather_grouped_gemm_act_fusion
        self._multiply_and_add = sm90_contiguous_grouped_gemm_finalize_fusion
        self._rows, self._inputs, self._activation = rows, inputs, activation
        self._w13, self._w2, self._out = w13, w2, out
        device = inputs.hidden.device
        self._slots = inputs.expert_map.on(device)
        table = RouteTable.empty(inputs.topk_ids.numel(), w13.shape[0], rows, device)
        self._table, self._limits = table, torch.empty_like(table.block_expert)
        self._blocks = torch.empty_like(table.num_padded)
        self._y = inputs.hidden.new_empty(table.max_padded, w2.shape[2])
        self._where = (table.block_expert, self._limits, table.sorted_routes, self._blocks)

    def route(self) -> None:
        """Which routes the blocks have."""
        from epfuse.bench.peers.flashinfer_kernel import limits_kernel
        from epfuse.stages.route.launch import launch_route

        table = launch_route(self._inputs.topk_ids, self._slots, self._w13.shape[0], self._table)
        limits_kernel[(table.max_blocks,)](
            table.sorted_routes, table.num_padded, self._limits, self._blocks, table.num_routes, BLOCK_M=self._rows
        )

    def gate_up(self, tile: GateUpTile) -> torch.Tensor:
        """The activated rows."""
        columns, swizzle = tile
        gate = self._activation
        self._multiply_and_activate(
            self._inputs.hidden, self._w13, *self._where, out=self._y, topk=self._inputs.topk_ids.shape[1],
            permuted_m=self._table.max_padded, tile_shape_mn=(self._rows, columns), swizzle_size=swizzle,
            swiglu_alpha=gate.alpha, swiglu_beta=gate.beta,
            # infinity is refused, and no BF16 number exceeds this one
            swiglu_limit=min(gate.limit, torch.finfo(torch.float32).max),
        )  # fmt: skip
        return self._y

    def down(self, tile: DownTile) -> torch.Tensor:
        """The output, to which each route's row is added."""
        columns, cluster = tile
        self._multiply_and_add(
            self._y, self._w2, *self._where, self._inputs.topk_weights, self._out, topk=self._inputs.topk_ids.shape[1],
            tile_shape_mn=(self._rows, columns), cluster_shape_mn=cluster,
        )  # fmt: skip
        return self._out


def make(weights: LayerWeights) -> Contender:
    """Zero the output on a second stream as FlashInfer does; route, multiply and activate, multiply and add up.

    FlashInfer's own routing (``moe_sort``) is replaced by ours and a small kernel after it.

    Raises:
        MissingDependency: this FlashInfer has no such products (0.7.4 has).
    """
    try:
        from flashinfer.fused_moe.cute_dsl.sm90_contiguous_gather_grouped_gemm_act_fusion import interleave_up_gate_sm90
    except ImportError as error:
        raise MissingDependency(f"this FlashInfer has no experts for sm_90 (0.7.4 has): {error}") from None

    dense, device = weights.dense, weights.device
    w13, w2, activation = interleave_up_gate_sm90(dense.w13), dense.w2, weights.layer.activation
    side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    chosen: dict[int, Tactic] = {}

    def bind(inputs: Inputs) -> Call:
        out = torch.empty_like(inputs.hidden)
        if inputs.tokens not in chosen:
            tried = (GroupedCall(rows, inputs, w13, w2, activation, out) for rows in ROWS)
            chosen[inputs.tokens] = DEFAULT if side is None else fastest(zip(ROWS, tried, strict=True), device)
        tactic = chosen[inputs.tokens]
        grouped = GroupedCall(tactic.rows, inputs, w13, w2, activation, out)

        def call() -> torch.Tensor:
            zeroed = _zero(out, side)
            grouped.route()
            grouped.gate_up(tactic.gate_up)
            if zeroed is not None:
                torch.cuda.current_stream(device).wait_event(zeroed)
            return grouped.down(tactic.down)

        return call

    return Contender(
        name=NAME,
        kind=ContenderKind.PEER,
        weights="bf16",
        form=WeightFormat.DENSE,
        operand=MatrixOperand.BF16,
        tolerance=PEER_TOLERANCE,
        method=TimingMethod.PLAIN if side is None else TimingMethod.GRAPH,
        bind=bind,
        note="the two products of cute_dsl_fused_moe_bf16 in the fastest of its tiles, which sum in BF16 by atomics;"
        " our routing in place of moe_sort",
        block_m=lambda tokens: chosen[tokens].rows if tokens in chosen else None,
    )


def fastest(sizes: Iterable[tuple[int, GroupedCall]], device: torch.device) -> Tactic:
    """The tiles that take the least time, each product timed by itself.

    Args:
        sizes: rows of a block, and a call in such blocks.
        device: a GPU.

    Raises:
        ConfigError: FlashInfer has no tiles for these sizes.
    """
    found: list[tuple[float, Tactic]] = []
    for rows, grouped in sizes:
        grouped.route()
        up_us, up = min((_us(partial(grouped.gate_up, tile), device), tile) for tile in GATE_UP)
        down_us, down = min((_us(partial(grouped.down, tile), device), tile) for tile in DOWN)
        found.append((up_us + down_us, Tactic(rows, up, down)))
    us, best = min(found)
    if math.isinf(us):
        raise ConfigError("FlashInfer has no tiles for these sizes")
    return best


def _us(call: Call, device: torch.device) -> float:
    """Microseconds of a call; infinity if FlashInfer refuses the tile."""
    try:
        call()
    except ValueError:
        return math.inf
    return time_calls([call], device, BRIEF, TimingMethod.GRAPH).timing.median_us


def _zero(out: torch.Tensor, side: Any) -> Any:
    """Zeros into ``out`` on the stream ``side``, and the event after them; on the host's thread without a stream."""
    if side is None:
        out.zero_()
        return None
    side.wait_stream(torch.cuda.current_stream(out.device))
    with torch.cuda.stream(side):
        out.zero_()
        return side.record_event()


CONTENDERS: dict[str, Callable[[LayerWeights], Contender]] = {NAME: make}
