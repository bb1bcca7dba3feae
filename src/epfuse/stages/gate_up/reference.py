"""GEMM1 with its activation in plain PyTorch: the oracle of the kernels."""

from __future__ import annotations

import torch

from epfuse.config import Activation
from epfuse.stages.activation_reference import activated
from epfuse.stages.route.table import RouteTable
from epfuse.weights.projections import Stack, expert_matrix


def gate_up(
    x: torch.Tensor,
    w13: Stack,
    routes: RouteTable,
    top_k: int,
    activation: Activation,
    compute: torch.dtype = torch.float32,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """One matmul per active expert; rows of remote routes are left unwritten.

    Args:
        x: ``[T, H]``.
        w13: ``[L, 2I, H]`` in any format; ``[L, I, H]`` where the activation has no gate.
        routes: RouteTable of this call.
        top_k: K.
        activation: between the two GEMMs.
        compute: dtype of the matmul and the activation; with float32 the accumulators are rounded to x's dtype before
            the activation, as the kernels do, with float64 nothing is rounded in between.
        bias: ``[L, 2I]`` or ``[L, I]`` float32, added to the accumulators before that; None for none.

    Returns:
        ``[R, I]`` in x's dtype (float64 if ``compute`` is).
    """
    dtype = torch.float64 if compute == torch.float64 else x.dtype
    out = torch.empty(routes.num_routes, w13.shape[1] // activation.inputs, dtype=dtype, device=x.device)
    for expert, rows in routes.groups():
        acc = x[rows // top_k].to(compute) @ expert_matrix(w13, expert, compute).T
        if bias is not None:
            acc += bias[expert].to(compute)
        out[rows] = activated(acc.to(dtype).to(compute), activation).to(dtype)
    return out
