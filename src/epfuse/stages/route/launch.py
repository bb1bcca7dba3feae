"""Launch the routing kernels."""

from __future__ import annotations

import torch

from epfuse.stages.extent import extents
from epfuse.stages.grid import pieces, power_of_two
from epfuse.stages.route.kernel import count_kernel, place_kernel, route_kernel
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import RouteTiles
from epfuse.target import overlap_previous, target_of


def launch_route(
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor,
    local: int,
    table: RouteTable,
    tiles: RouteTiles | None = None,
) -> RouteTable:
    """Group the local routes by expert and pad each group to a block, on the GPU.

    Args:
        topk_ids: ``[T, K]`` int32 or int64, contiguous; ids outside [0, E) are skipped, never dereferenced.
        expert_map: ``[E]`` int32 on the same device, local slot or -1.
        local: L.
        table: `RouteTable.empty` of R routes over L experts; filled, its arrivals with zeros.
        tiles: RouteTiles; None takes the default.

    Returns:
        ``table``. Within an expert the routes ascend, so the result is the same in every run.

    Host syncs: none; graph-capturable. One launch up to ``tiles.one_launch_routes`` routes, two above.
    """
    tiles = tiles or RouteTiles()
    routes, block_m = table.num_routes, table.block_m
    counters = 0 if table.arrivals is None else table.arrivals.numel()
    shape = {"L": local, "BINS": power_of_two(local + 1)}
    blocks = {"BLOCK_M": block_m, "PADDING": power_of_two(block_m), "BLOCKS": 16}
    memory = (table.sorted_routes, table.block_expert, table.block_row, table.num_padded, table.arrivals)
    sizes = (routes, expert_map.numel(), counters)
    target, slots = target_of(topk_ids.device), expert_map
    overlap, (ids,) = overlap_previous(target), extents(target, topk_ids)
    if routes <= tiles.one_launch_routes:
        count = min(tiles.count, max(32, power_of_two(routes)))
        warps = {"num_warps": 4 if count <= 1024 else 8}
        route_kernel[(local,)](ids, slots, *memory, *sizes, **shape, **blocks, COUNT=count, **overlap, **warps)
    else:
        grid = (pieces(routes, tiles.chunk),)
        shape["CHUNK"] = tiles.chunk
        counts = torch.empty((grid[0], shape["BINS"]), dtype=torch.int32, device=topk_ids.device)
        count_kernel[grid](ids, slots, counts, routes, expert_map.numel(), **shape, **overlap)
        place_kernel[grid](ids, slots, counts, *memory, *sizes, **shape, **blocks, ROWS=32, **overlap)
    return table
