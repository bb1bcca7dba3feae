"""Top-k sum in plain PyTorch: the oracle of the kernel."""

from __future__ import annotations

import torch

from epfuse.stages.route.reference import local_experts


def combine(
    routed: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor,
    dtype: torch.dtype,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Sum a token's local routes in route order.

    Args:
        routed: ``[R, H]``; rows of remote routes may hold anything, NaN too.
        topk_ids: ``[T, K]``.
        expert_map: ``[E]`` int32.
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
        acc[hit] += rows[hit, k].to(compute)
    return acc.to(dtype)
