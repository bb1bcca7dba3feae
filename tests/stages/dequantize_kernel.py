"""`dequantize` of grouped_gemm.py in a kernel of its own."""

import triton
import triton.language as tl

from epfuse.stages.grouped_gemm import dequantize


@triton.jit
def dequantize_kernel(values, scales, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program: out = values [ROWS, COLUMNS] times the scales [ROWS, COLUMNS / 32]."""
    rows = tl.arange(0, ROWS)[:, None]
    where = rows * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    groups = rows * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)[None, :]
    tl.store(out + where, dequantize(tl.load(values + where), tl.load(scales + groups), ROWS, COLUMNS))
