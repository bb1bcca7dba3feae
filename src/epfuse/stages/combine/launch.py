"""Launch the combine kernel."""

from __future__ import annotations

import torch

from epfuse.stages.combine.kernel import combine_kernel
from epfuse.stages.extent import extents
from epfuse.stages.grid import pieces, power_of_two
from epfuse.target import overlap_previous, target_of


def launch_combine(
    routed: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor,
    local: int,
    out: torch.Tensor,
    route_row: torch.Tensor | None = None,
    out_is_free: bool = False,
) -> torch.Tensor:
    """Sum a token's local routes in route order, in FP32; remote rows are never read.

    Args:
        routed: ``[R, H]`` contiguous.
        topk_ids: ``[T, K]`` int32 or int64, contiguous; not written by the launch right before this one, which on
            Hopper may still be running when they are read.
        expert_map: ``[E]`` int32.
        local: L.
        out: ``[T, H]``; every element is written, zero for a token without a local route.
        route_row: ``[R]`` int32 from what packed the rows, where they lie packed; None if row r is of route r.
        out_is_free: whether nothing that runs before uses the memory of ``out`` for anything else. Then zeros are
            written while it still runs, and where rows lie packed ``out`` has the rows of `LoneTokens` already.

    Returns:
        ``out``.

    Host syncs: none; graph-capturable; bitwise repeatable.
    """
    tokens, top_k = topk_ids.shape
    hidden = routed.shape[1]
    # many tokens fill the GPU anyway: fewer, longer programs then wait less often for their ids
    block = min(2048 if tokens >= 512 else 1024, power_of_two(hidden))
    target = target_of(out.device)
    rows, ids, results = extents(target, routed, topk_ids, out)
    combine_kernel[(tokens, pieces(hidden, block))](
        rows,
        ids,
        expert_map,
        route_row,
        results,
        topk_ids.numel(),
        expert_map.numel(),
        hidden,
        int(out_is_free),
        L=local,
        K=top_k,
        K_LANES=power_of_two(top_k),
        BLOCK_H=block,
        num_warps=4,
        **overlap_previous(target),
    )
    return out
