"""`quantize_block` inside another kernel, on a tile of three dimensions, as a fused epilogue has it."""

import triton
import triton.language as tl

from epfuse.stages.quantize.kernel import quantize_block, widen


@triton.jit
def tile_kernel(x, codes, scales, ROWS: tl.constexpr, GROUPS: tl.constexpr, FNUZ: tl.constexpr):
    """One program: codes and scales of x [ROWS, GROUPS * 32]."""
    groups = tl.arange(0, ROWS)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    where = groups[:, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    code, scale = quantize_block(widen(tl.load(x + where)), FNUZ)
    tl.store(codes + where, code)
    tl.store(scales + groups, scale)
