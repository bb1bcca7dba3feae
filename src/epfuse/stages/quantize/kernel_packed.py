"""FP8 rows with one scale each, packed in the route table's order."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from epfuse.stages.quantize.kernel import quantize_block, widen
from epfuse.stages.route.kernel import local_slots


@triton.jit(do_not_specialize=["R"])
def quantize_packed_kernel(
    x, codes, scales, route_row, lone_token, topk_ids, expert_map, sorted_routes, block_row, num_padded, R, E, H,
    L: tl.constexpr, K: tl.constexpr, K_LANES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """codes[row of a route], scales[row] of x[route // K], or of x[row] if K is 0: then x lies packed already.

    A row at a time; each program takes every num_programs-th slot. route_row and lone_token as gather_kernel's.
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
            source = row
            if K > 0:
                source = route // K
            values = tl.load(x + source.to(tl.int64) * H + columns, mask=inside, other=0.0)
            if route_row is not None:
                tl.store(route_row + route, row)
            if lone_token is not None:
                ks = tl.arange(0, K_LANES)
                local = (ks < K) & (local_slots(topk_ids, expert_map, source * K + ks, R, E, L) < L)
                tl.store(lone_token + row, tl.where(tl.sum(local.to(tl.int32), 0) == 1, source, -1))
            code, scale = quantize_block(tl.reshape(widen(values), (1, BLOCK_H)), True, False)
            tl.store(codes + row.to(tl.int64) * H + columns, tl.reshape(code, (BLOCK_H,)), mask=inside)
            tl.store(scales + row + tl.arange(0, 1), scale)
