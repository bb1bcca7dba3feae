"""GEMM2 in plain PyTorch: the oracle of the kernels."""

from __future__ import annotations

import torch

from epfuse.stages.route.table import RouteTable
from epfuse.weights.projections import Stack, expert_matrix


def down(
    y: torch.Tensor,
    w2: Stack,
    routes: RouteTable,
    topk_weights: torch.Tensor,
    compute: torch.dtype = torch.float32,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """One matmul per active expert, times the router weight; rows of remote routes are left unwritten.

    Args:
        y: ``[R, I]``, output of gate_up.
        w2: ``[L, H, I]`` in any format.
        routes: RouteTable of this call.
        topk_weights: ``[T, K]`` float32.
        compute: dtype of the matmul; the product with the router weight is rounded once, to y's dtype.
        bias: ``[L, H]`` float32, added before the router weight multiplies; None for none.

    Returns:
        ``[R, H]`` in y's dtype.
    """
    out = torch.empty(routes.num_routes, w2.shape[1], dtype=y.dtype, device=y.device)
    for expert, rows in routes.groups():
        acc = y[rows].to(compute) @ expert_matrix(w2, expert, compute).T
        if bias is not None:
            acc += bias[expert].to(compute)
        acc *= topk_weights.reshape(-1)[rows, None].to(compute)
        out[rows] = acc.to(y.dtype)
    return out
