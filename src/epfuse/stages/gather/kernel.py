"""Gather kernel: the rows of the local routes, packed in the route table's order."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from epfuse.stages.route.kernel import local_slots


@triton.jit(do_not_specialize=["R"])
def gather_kernel(
    x, out, route_row, lone_token, topk_ids, expert_map, sorted_routes, block_row, num_padded, R, E, H,
    L: tl.constexpr, K: tl.constexpr, K_LANES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[row of a route] = x[route // K], a row at a time; each program takes every num_programs-th slot.

    If asked for, route_row[route] = that row, and lone_token[row] = the route's token where it has no other local
    route, or -1.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # not before: the next kernel reads the route table at once
    columns = tl.arange(0, BLOCK_H)
    inside = columns < H
    for slot in range(tl.program_id(0), tl.load(num_padded), tl.num_programs(0)):
        route = tl.load(sorted_routes + slot)
        if route < R:
            row = tl.load(block_row + slot // BLOCK_M) + slot % BLOCK_M
            token = route // K
            values = tl.load(x + token.to(tl.int64) * H + columns, mask=inside)
            if route_row is not None:
                tl.store(route_row + route, row)
            if lone_token is not None:
                ks = tl.arange(0, K_LANES)
                local = (ks < K) & (local_slots(topk_ids, expert_map, token * K + ks, R, E, L) < L)
                tl.store(lone_token + row, tl.where(tl.sum(local.to(tl.int32), 0) == 1, token, -1))
            # the weights of the experts before go through L2 before this row is read
            tl.store(out + row.to(tl.int64) * H + columns, values, mask=inside, eviction_policy="evict_last")
