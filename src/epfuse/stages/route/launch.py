"""Launch the routing kernels."""

from __future__ import annotations

import torch
import triton

from epfuse.stages.route.kernel import count_kernel, place_kernel, route_kernel
from epfuse.stages.route.table import RouteTable, max_padded
from epfuse.stages.tiles import RouteTiles
from epfuse.target import overlap_previous, target_of


def launch_route(
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor,
    local: int,
    block_m: int,
    tiles: RouteTiles | None = None,
    arrivals_per_block: int = 0,
) -> RouteTable:
    """Group the local routes by expert and pad each group to ``block_m``, on the GPU.

    Args:
        topk_ids: ``[T, K]`` int32 or int64, contiguous; ids outside [0, E) are skipped, never dereferenced.
        expert_map: ``[E]`` int32 on the same device, local slot or -1.
        local: L.
        block_m: rows of one block.
        tiles: RouteTiles; None takes the default.
        arrivals_per_block: counters to clear for each block that the table can hold, for kernels that split K.

    Returns:
        RouteTable. Within an expert the routes ascend, so the result is the same in every run.

    Host syncs: none; graph-capturable. One launch up to ``tiles.one_launch_routes`` routes, two above.
    """
    tiles = tiles or RouteTiles()
    routes = topk_ids.numel()
    size = max_padded(routes, local, block_m)
    device = topk_ids.device
    sorted_routes = torch.empty(size, dtype=torch.int32, device=device)
    block_expert = torch.empty(size // block_m, dtype=torch.int32, device=device)
    block_row = torch.empty_like(block_expert)
    num_padded = torch.empty(1, dtype=torch.int32, device=device)
    counters = block_expert.numel() * arrivals_per_block
    arrivals = torch.empty(counters, dtype=torch.int32, device=device) if counters else None
    shape = {"L": local, "BINS": triton.next_power_of_2(local + 1)}
    blocks = {"BLOCK_M": block_m, "PADDING": triton.next_power_of_2(block_m), "BLOCKS": 16}
    table = (sorted_routes, block_expert, block_row, num_padded, arrivals)
    sizes = (routes, expert_map.numel(), counters)
    overlap = overlap_previous(target_of(device))
    if routes <= tiles.one_launch_routes:
        count = min(tiles.count, max(32, triton.next_power_of_2(routes)))
        warps = {"num_warps": 4 if count <= 1024 else 8}
        route_kernel[(local,)](topk_ids, expert_map, *table, *sizes, **shape, **blocks, COUNT=count, **overlap, **warps)
    else:
        grid = (triton.cdiv(routes, tiles.chunk),)
        shape["CHUNK"] = tiles.chunk
        counts = torch.empty((grid[0], shape["BINS"]), dtype=torch.int32, device=device)
        count_kernel[grid](topk_ids, expert_map, counts, routes, expert_map.numel(), **shape, **overlap)
        place_kernel[grid](topk_ids, expert_map, counts, *table, *sizes, **shape, **blocks, ROWS=32, **overlap)
    return RouteTable(sorted_routes, block_expert, block_row, num_padded, routes, block_m, arrivals)
