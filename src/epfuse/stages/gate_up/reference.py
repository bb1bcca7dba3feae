"""GEMM1 with its activation in plain PyTorch: the oracle of the kernels and the CPU's path."""

from __future__ import annotations

import torch

from epfuse.config import SwiGLUOAI
from epfuse.stages.route.table import RouteTable
from epfuse.weights.experts import Stack, expert_matrix, stack_rows


def swiglu_oai(gate_up: torch.Tensor, activation: SwiGLUOAI) -> torch.Tensor:
    """``[.., 2I]`` (gate half, then up half) -> ``[.., I]`` in the input's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=activation.limit)
    up = up.clamp(-activation.limit, activation.limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + activation.beta)


def gate_up(
    x: torch.Tensor,
    w13: Stack,
    routes: RouteTable,
    top_k: int,
    activation: SwiGLUOAI,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    """One matmul per active expert; rows of remote routes are left unwritten.

    Args:
        x: ``[T, H]``.
        w13: ``[L, 2I, H]`` in any format.
        routes: RouteTable of this call.
        top_k: K.
        activation: its parameters.
        compute: dtype of the matmul and the activation; with float32 the accumulators are rounded to x's dtype before
            the activation, as the kernels do, with float64 nothing is rounded in between.

    Returns:
        ``[R, I]`` in x's dtype (float64 if ``compute`` is).
    """
    dtype = torch.float64 if compute == torch.float64 else x.dtype
    out = torch.empty(routes.num_routes, stack_rows(w13) // 2, dtype=dtype, device=x.device)
    for expert, rows in routes.groups():
        acc = x[rows // top_k].to(compute) @ expert_matrix(w13, expert, compute).T
        out[rows] = swiglu_oai(acc.to(dtype).to(compute), activation).to(dtype)
    return out
