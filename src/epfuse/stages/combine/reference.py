"""Top-k sum in plain PyTorch: the oracle of the kernel and the CPU's path."""

from __future__ import annotations

import torch

from epfuse.stages.route.reference import local_experts


def combine(
    routed: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor,
    topk_weights: torch.Tensor | None,
    dtype: torch.dtype,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Sum a token's local routes in route order.

    Args:
        routed: ``[R, H]``; rows of remote routes may hold anything, NaN too.
        topk_ids: ``[T, K]``.
        expert_map: ``[E]`` int32.
        topk_weights: ``[T, K]`` float32 to weight here, None if the rows are weighted already.
        dtype: dtype of the result.
        compute: dtype of the sum.

    Returns:
        ``[T, H]``; zero for a token without a local route.
    """
    tokens, top_k = topk_ids.shape
    live = (local_experts(topk_ids, expert_map) >= 0).view(tokens, top_k)
    rows = routed.view(tokens, top_k, -1)
    acc = torch.zeros(tokens, routed.shape[1], dtype=compute, device=routed.device)
    for k in range(top_k):
        hit = live[:, k].nonzero().squeeze(1)
        row = rows[hit, k].to(compute)
        if topk_weights is not None:
            row = row * topk_weights[hit, k, None].to(compute)
        acc[hit] += row
    return acc.to(dtype)
