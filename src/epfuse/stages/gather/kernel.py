"""Gather kernel: the rows of the local routes, packed in the route table's order."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["R"])
def gather_kernel(
    x, out, sorted_routes, block_row, num_padded, R, H,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[row of a route] = x[route // K], a row at a time; each program takes every num_programs-th slot."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # not before: the next kernel reads the route table at once
    columns = tl.arange(0, BLOCK_H)
    inside = columns < H
    for slot in range(tl.program_id(0), tl.load(num_padded), tl.num_programs(0)):
        route = tl.load(sorted_routes + slot)
        if route < R:
            row = tl.load(block_row + slot // BLOCK_M) + slot % BLOCK_M
            values = tl.load(x + (route // K).to(tl.int64) * H + columns, mask=inside)
            tl.store(out + row.to(tl.int64) * H + columns, values, mask=inside)
