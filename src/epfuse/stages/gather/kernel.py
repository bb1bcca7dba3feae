"""Gather kernel: the rows of the local routes, packed in the route table's order."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from epfuse.kernel_cache import cached
from epfuse.stages.route.kernel import local_slots


@triton.jit
def route_at(sorted_routes, slot, slots, R):
    """The route of a slot of the table; R past its end."""
    return tl.load(sorted_routes + slot, mask=slot < slots, other=R)


@triton.jit
def row_of(x, source, H, inside, route, R):
    """Row ``source`` of x; nothing is loaded where there is no route."""
    return tl.load(x + source.to(tl.int64) * H + tl.arange(0, inside.shape[0]), mask=inside & (route < R), other=0.0)


@triton.jit
def note_row(
    route_row, lone_token, lone_stored, topk_ids, expert_map, route, row, R, E,
    L: tl.constexpr, K: tl.constexpr, K_LANES: tl.constexpr,
):  # fmt: skip
    """If asked for: route_row[route] = row; lone_token[row] = the route's token, -1 if that has another local route.

    Where lone_stored is 0 all of lone_token's are -1.
    """
    if route_row is not None:
        tl.store(route_row + route, row)
    if lone_token is not None:
        token = route // K
        ks = tl.arange(0, K_LANES)
        local = (ks < K) & (local_slots(topk_ids, expert_map, token * K + ks, R, E, L) < L)
        tl.store(lone_token + row, tl.where((tl.sum(local.to(tl.int32), 0) == 1) & (lone_stored != 0), token, -1))


@cached
@triton.jit(do_not_specialize=["R", "lone_stored"])
def gather_kernel(
    x, out, route_row, lone_token, topk_ids, expert_map, sorted_routes, block_row, num_padded,
    R, E, H, lone_stored,
    L: tl.constexpr, K: tl.constexpr, K_LANES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[row of a route] = x[route // K], a row at a time; each program takes every num_programs-th slot.

    route_row, lone_token and lone_stored as note_row takes them.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # not before: the next kernel reads the route table at once
    columns = tl.arange(0, BLOCK_H)
    inside = columns < H
    slots = tl.load(num_padded)
    programs = tl.num_programs(0)
    first = tl.program_id(0)
    route = route_at(sorted_routes, first, slots, R)
    next_route = route_at(sorted_routes, first + programs, slots, R)
    values = row_of(x, route // K, H, inside, route, R)
    for slot in range(first, slots, programs):
        # one row ahead, and its route two: a row waits for its route, and that is most of the time that a row takes
        next_values = row_of(x, next_route // K, H, inside, next_route, R)
        second_route = route_at(sorted_routes, slot + 2 * programs, slots, R)
        if route < R:
            row = tl.load(block_row + slot // BLOCK_M) + slot % BLOCK_M
            note_row(route_row, lone_token, lone_stored, topk_ids, expert_map, route, row, R, E, L, K, K_LANES)
            # the weights of the experts before go through L2 before this row is read
            tl.store(out + row.to(tl.int64) * H + columns, values, mask=inside, eviction_policy="evict_last")
        route = next_route
        next_route = second_route
        values = next_values
