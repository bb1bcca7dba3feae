"""Top-k sum of a token's local routes; rows of remote routes are never read."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from epfuse.kernel_cache import cached
from epfuse.stages.route.kernel import local_slots


@cached
@triton.jit(do_not_specialize=["R", "out_is_free"])
def combine_kernel(
    routed, topk_ids, expert_map, route_row, out,
    R, E, H, out_is_free,
    L: tl.constexpr, K: tl.constexpr, K_LANES: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k, in order, of the local rows routed[t*K + k], in FP32, rounded once.

    With route_row the rows lie packed, that of t*K + k at routed[route_row[t*K + k]].
    out_is_free, 0 or 1: the kernel before uses out's memory for nothing else, and where rows lie packed out[t] is there
    already if only one of its routes is local. K_LANES is a power of two, at least K.
    """
    EVICT: tl.constexpr = "" if route_row is None else "evict_first"  # what has been kept in L2 has been read
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = columns < H
    results = out + token.to(tl.int64) * H + columns
    ks = tl.arange(0, K_LANES)
    local = (ks < K) & (local_slots(topk_ids, expert_map, token * K + ks, R, E, L) < L)
    count = tl.sum(local.to(tl.int32), 0)
    if PDL:
        if out_is_free == 0:
            gdc_wait()
    if count == 0:
        tl.store(results, tl.zeros((BLOCK_H,), out.dtype.element_ty), mask=inside)
    if PDL:
        if out_is_free != 0:
            gdc_wait()  # for the rows; the ids are older than the kernel before
    stored = 0
    if route_row is not None:
        stored = out_is_free
    if count > stored:
        acc = tl.zeros((BLOCK_H,), tl.float32)
        for k in tl.static_range(K):
            route = token * K + k
            live = tl.sum(tl.where(ks == k, local.to(tl.int32), 0), 0) > 0
            place = route
            if route_row is not None:
                place = tl.load(route_row + route, mask=live, other=0)
            rows = routed + place.to(tl.int64) * H + columns
            row = tl.load(rows, mask=inside & live, other=0.0, eviction_policy=EVICT).to(tl.float32)
            acc += row
        tl.store(results, acc.to(out.dtype.element_ty), mask=inside)
