"""DeepGEMM's grouped FP8 products on block FP8 weights, with routing and Triton kernels of ours around them."""

from __future__ import annotations

from typing import Any

import torch

from epfuse.bench.contender import Contender, ContenderKind
from epfuse.bench.inputs import Inputs
from epfuse.bench.measure import Call, TimingMethod
from epfuse.bench.roofline import MatrixOperand
from epfuse.bench.weights import LayerWeights
from epfuse.config import WeightFormat
from epfuse.errors import ConfigError
from epfuse.stages.grid import pieces, power_of_two
from epfuse.verify.budget import fp8_tolerance
from epfuse.weights.block_fp8 import BLOCK, BlockFP8Experts

NAME = "DeepGEMM"
ROWS = 128
"""Of a block: what vLLM aligns an expert's rows to for the contiguous layout on Hopper."""


def make(weights: LayerWeights) -> Contender:
    """Route, pack and quantise rows, multiply, activate and quantise, multiply, add up: seven launches or so.

    vLLM's own glue takes more of them: it quantises before it packs, and counts, scatters and fills on the way. The
    host knows how many rows are local, as it does after an all-to-all; DeepGEMM loads what blocks without a row would
    read.

    Raises:
        ConfigError: DeepGEMM can't have the layer's sizes.
    """
    import deep_gemm

    shape, activation = weights.layer.shape, weights.layer.activation
    hidden, between = shape.hidden, shape.intermediate
    if hidden % BLOCK or between % BLOCK:
        raise ConfigError(f"H is {hidden} and I {between}; DeepGEMM's block FP8 wants multiples of {BLOCK}")

    def bind(inputs: Inputs) -> Call:
        from epfuse.bench.peers.deep_gemm_kernel import activate_rows_kernel, add_rows_kernel, pack_kernel
        from epfuse.stages.route.launch import launch_route
        from epfuse.stages.route.table import RouteTable, max_padded

        experts = weights.in_format(WeightFormat.BLOCK_FP8).held(BlockFP8Experts)
        assert experts is not None
        device, (tokens, top_k) = inputs.hidden.device, inputs.topk_ids.shape
        table = RouteTable.empty(tokens * top_k, shape.local_experts, ROWS, device)
        rows = max_padded(inputs.rows, shape.local_experts, ROWS)
        slots = inputs.expert_map.on(device)
        x, y = _rows(rows, hidden, device), _rows(rows, between, device)
        gate_up, routed = (inputs.hidden.new_empty(rows, size) for size in (2 * between, hidden))
        group_of_row, row_of_route = (slots.new_empty(count) for count in (rows, tokens * top_k))
        out = torch.empty_like(inputs.hidden)
        hardware = device.type == "cuda"
        w13, w2 = ((stack.values, stack.scales) for stack in (experts.w13, experts.w2))

        def call() -> torch.Tensor:
            launch_route(inputs.topk_ids, slots, shape.local_experts, table)
            pack_kernel[(rows,)](
                inputs.hidden, x[0].view(torch.uint8), x[1], group_of_row, row_of_route, table.sorted_routes,
                table.block_expert, table.num_padded, tokens * top_k, hidden, rows,
                K=top_k, BLOCK_M=ROWS, BLOCK_H=power_of_two(hidden), GROUP=BLOCK, HARDWARE=hardware, num_warps=8,
            )  # fmt: skip
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(x, w13, gate_up, group_of_row)
            activate_rows_kernel[(rows,)](
                gate_up, y[0].view(torch.uint8), y[1], table.sorted_routes, table.num_padded, tokens * top_k, between,
                rows, activation.parameters,
                BLOCK_I=power_of_two(between), GROUP=BLOCK, HARDWARE=hardware, ACTIVATION=activation.kind, num_warps=8,
            )  # fmt: skip
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(y, w2, routed, group_of_row)
            add_rows_kernel[(tokens, pieces(hidden, 1024))](
                routed, inputs.topk_weights, inputs.topk_ids, slots, row_of_route, out, hidden, K=top_k, BLOCK_H=1024
            )  # fmt: skip
            return out

        return call

    return Contender(
        name=NAME,
        kind=ContenderKind.PEER,
        weights=WeightFormat.BLOCK_FP8.value,
        form=WeightFormat.BLOCK_FP8,
        operand=MatrixOperand.FP8,
        tolerance=fp8_tolerance(),
        method=TimingMethod.GRAPH if weights.device.type == "cuda" else TimingMethod.PLAIN,
        bind=bind,
        note="m_grouped_fp8_gemm_nt_contiguous twice; our routing and Triton kernels around it in place of vLLM's; the"
        " number of local rows is known to the host",
        block_m=lambda tokens: ROWS,
    )


def _rows(rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 ``[rows, columns]`` and float32 ``[rows, columns / 128]``, whose columns are contiguous, as TMA wants."""
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    return values, torch.empty(columns // BLOCK, rows, dtype=torch.float32, device=device).T


CONTENDERS: dict[str, Any] = {NAME: make}
