"""A kernel that does nothing but read memory."""

import triton
import triton.language as tl


@triton.jit
def read_kernel(source, sums, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Add up int32 words: program p reads ``BLOCK * STEPS`` of them, adjacent, and stores one sum."""
    program = tl.program_id(0).to(tl.int64)
    words = source + program * BLOCK * STEPS + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for step in tl.static_range(STEPS):  # unrolled: all loads are under way before the first is needed
        total += tl.load(words + step * BLOCK)
    tl.store(sums + program, tl.sum(total))
