"""Launch the gather kernel."""

from __future__ import annotations

from typing import Any

import torch

from epfuse.stages.gather.kernel import gather_kernel
from epfuse.stages.grid import power_of_two
from epfuse.stages.route.table import LoneTokens, RouteTable
from epfuse.target import compute_units, overlap_previous, target_of

PROGRAMS_PER_UNIT = 4
"""More of them find places only one after another, and a program starts in the time of a row."""


def launch_gather(
    x: torch.Tensor,
    routes: RouteTable,
    top_k: int,
    out: torch.Tensor,
    route_row: torch.Tensor | None = None,
    lone: LoneTokens | None = None,
) -> torch.Tensor:
    """Copy the row of each local route, so that the rows of an expert are adjacent.

    Args:
        x: ``[T, H]`` of any dtype, contiguous.
        routes: RouteTable of this call; route r has row ``r // K``.
        top_k: K.
        out: ``[R, H]``, dtype of x; only as many rows as there are local routes are written, the first ones.
        route_row: ``[R]`` int32, written for local routes: the row of each; None if nobody asks.
        lone: to have its ``of_row`` written, as far as ``out`` is.

    Returns:
        ``out``.

    Host syncs: none; graph-capturable.
    """
    grid, operands, options = packing(routes, top_k, x.shape[1], x.device, PROGRAMS_PER_UNIT, route_row, lone)
    gather_kernel[grid](x, out, *operands, **options)
    return out


def packing(
    routes: RouteTable,
    top_k: int | None,
    hidden: int,
    device: torch.device,
    programs_per_unit: int,
    route_row: torch.Tensor | None,
    lone: LoneTokens | None,
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """Grid, last operands and options of a kernel that writes rows in the route table's order.

    Args:
        routes: RouteTable of this call.
        top_k: route r has row ``r // top_k`` of the rows that are read; None if they lie packed.
        hidden: columns.
        device: where.
        programs_per_unit: at the most.
        route_row: as `launch_gather` takes it.
        lone: as `launch_gather` takes it; needs top_k.
    """
    of_row, topk_ids, expert_map = (None,) * 3 if lone is None else (lone.of_row, lone.topk_ids, lone.expert_map)
    experts = 0 if expert_map is None else expert_map.numel()
    sizes = (routes.num_routes, experts, hidden, int(lone is not None and lone.stored))
    table = (routes.sorted_routes, routes.block_row, routes.num_padded)
    options: dict[str, Any] = {
        "L": 0 if lone is None else lone.local,
        "K": top_k or 0,
        "K_LANES": power_of_two(top_k or 1),
        "BLOCK_M": routes.block_m,
        "BLOCK_H": power_of_two(hidden),
        "num_warps": 8,
        **overlap_previous(target_of(device)),
    }
    programs = min(routes.max_padded, programs_per_unit * compute_units(device))
    return (programs,), (route_row, of_row, topk_ids, expert_map, *table, *sizes), options
