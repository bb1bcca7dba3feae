"""Launch the gather kernel."""

from __future__ import annotations

import torch
import triton

from epfuse.stages.gather.kernel import gather_kernel
from epfuse.stages.route.table import RouteTable
from epfuse.target import compute_units, overlap_previous, target_of

PROGRAMS_PER_UNIT = 16


def launch_gather(x: torch.Tensor, routes: RouteTable, top_k: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Copy the row of each local route, so that the rows of an expert are adjacent.

    Args:
        x: ``[T, H]``, contiguous.
        routes: RouteTable of this call; route r has row ``r // K``.
        top_k: K.
        out: ``[R, H]``, dtype of x; only as many rows as there are local routes are written, the first ones. Allocated
            if None.

    Returns:
        ``out``.

    Host syncs: none; graph-capturable.
    """
    hidden = x.shape[1]
    if out is None:
        out = torch.empty(routes.num_routes, hidden, dtype=x.dtype, device=x.device)
    programs = min(routes.max_padded, PROGRAMS_PER_UNIT * compute_units(x.device))
    gather_kernel[(programs,)](
        x,
        out,
        routes.sorted_routes,
        routes.block_row,
        routes.num_padded,
        routes.num_routes,
        hidden,
        K=top_k,
        BLOCK_M=routes.block_m,
        BLOCK_H=triton.next_power_of_2(hidden),
        num_warps=8,
        **overlap_previous(target_of(x.device)),
    )
    return out
