"""Launch the kernel that packs rows and quantises them."""

from __future__ import annotations

import torch

from epfuse.stages.grid import power_of_two
from epfuse.stages.quantize.kernel_packed import quantize_packed_kernel
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.route.table import LoneTokens, RouteTable
from epfuse.target import Target, compute_units, overlap_previous, target_of

PROGRAMS_PER_UNIT = 6


def launch_quantize_packed(
    x: torch.Tensor,
    routes: RouteTable,
    top_k: int | None,
    out: FP8Rows | None = None,
    route_row: torch.Tensor | None = None,
    lone: LoneTokens | None = None,
) -> FP8Rows:
    """Quantise the rows of the local routes to E4M3FN with one E8M0 scale a group, rounded up; packed.

    Row for row bitwise what `epfuse.stages.quantize.reference` gives with such groups.

    Args:
        x: contiguous bfloat16: ``[T, K]``, or ``[R, K]`` packed already.
        routes: RouteTable of this call; rows lie packed in its order.
        top_k: route r has row ``r // top_k`` of x; None if x lies packed.
        out: ``[R, K]``, in groups of a power of two or one group a row; only as many rows as there are local routes
            are written, the first ones. Allocated if None, with one group a row.
        route_row: as `launch_gather` takes it.
        lone: as `launch_gather` takes it; needs top_k.

    Returns:
        ``out``.

    Host syncs: none; graph-capturable; bitwise repeatable.
    """
    size, target = x.shape[1], target_of(x.device)
    of_row, topk_ids, expert_map = (None,) * 3 if lone is None else (lone.of_row, lone.topk_ids, lone.expert_map)
    if out is None:
        out = FP8Rows.empty(routes.num_routes, size, size, torch.float8_e4m3fn, x.device)
    programs = min(routes.max_padded, PROGRAMS_PER_UNIT * compute_units(x.device))
    quantize_packed_kernel[(programs,)](
        x,
        out.values.view(torch.uint8),
        out.scales,
        route_row,
        of_row,
        topk_ids,
        expert_map,
        routes.sorted_routes,
        routes.block_row,
        routes.num_padded,
        routes.num_routes,
        0 if expert_map is None else expert_map.numel(),
        size,
        int(lone is not None and lone.stored),
        L=0 if lone is None else lone.local,
        K=top_k or 0,
        K_LANES=power_of_two(top_k or 1),
        BLOCK_M=routes.block_m,
        BLOCK_H=power_of_two(size),
        GROUP=power_of_two(out.group),
        HARDWARE=target is Target.SM90,  # the interpreter's conversion truncates
        num_warps=8,
        **overlap_previous(target),
    )
    return out
