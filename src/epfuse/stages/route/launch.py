"""Launch the routing kernels."""

from __future__ import annotations

import functools

import torch

from epfuse.arguments import checks_enums
from epfuse.stages.extent import extents
from epfuse.stages.grid import pieces, power_of_two
from epfuse.stages.route.kernel import count_kernel, place_kernel, route_kernel
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import RouteTiles
from epfuse.target import Target, overlap_previous, target_of

SM90_CHUNKS = ((131072, 512), (49152, 256))
"""From so many routes on, and the chunk: a program reads all chunks' counts, and compares the routes of its own."""


@functools.lru_cache(maxsize=1024)
@checks_enums
def route_tiles(routes: int, target: Target) -> RouteTiles:
    """How so many routes are cut on a target; where the chunk changes was measured on an H200 alone."""
    if target is not Target.SM90:
        return RouteTiles()
    return RouteTiles(chunk=next((chunk for least, chunk in SM90_CHUNKS if routes >= least), RouteTiles.chunk))


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
        tiles: RouteTiles; None takes those of `route_tiles`.

    Returns:
        ``table``. Within an expert the routes ascend, so the result is the same in every run.

    Host syncs: none; graph-capturable. One launch up to ``tiles.one_launch_routes`` routes, two above.
    """
    routes, block_m, target = table.num_routes, table.block_m, target_of(topk_ids.device)
    tiles = tiles or route_tiles(routes, target)
    counters = 0 if table.arrivals is None else table.arrivals.numel()
    shape = {"L": local, "BINS": power_of_two(local + 1)}
    blocks = {"BLOCK_M": block_m, "PADDING": power_of_two(block_m), "BLOCKS": 16}
    memory = (table.sorted_routes, table.block_expert, table.block_row, table.num_padded, table.arrivals)
    sizes = (routes, expert_map.numel(), counters)
    slots, overlap, (ids,) = expert_map, overlap_previous(target), extents(target, topk_ids)
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
