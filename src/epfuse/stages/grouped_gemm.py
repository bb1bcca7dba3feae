"""Device code that both grouped GEMMs share: which tile a program takes, and the main loop."""

import triton
import triton.language as tl

from epfuse.stages.grouped_fp8_gemm import scales_to_float32


@triton.jit
def tile_of(pid, m_blocks, n_blocks, GROUP_M: tl.constexpr):
    """Program id -> (row block, column block).

    Rows walk first within a group of GROUP_M row blocks (0: all of them), so that the row blocks of one expert read
    its weights together. m_blocks comes from the device counter: programs with work have the lowest ids.
    """
    rows = m_blocks
    if GROUP_M > 0:
        rows = tl.minimum(m_blocks, GROUP_M)
    group = pid // (rows * n_blocks)
    inside = pid % (rows * n_blocks)
    rows_here = tl.minimum(m_blocks - group * rows, rows)
    return group * rows + inside % rows_here, inside // rows_here


@triton.jit
def e8m0_to_bf16(code):
    """E8M0 byte s -> 2^(s - 127) in BF16, exactly: the byte is the exponent field, except at its two ends."""
    field = code.to(tl.uint16) << 7
    field = tl.where(code == 0, 0x0040, field)  # 2^-127 is a BF16 subnormal
    field = tl.where(code == 255, 0x7FC0, field)  # NaN
    return field.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def dequantize(values, scales, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """BF16 [ROWS, COLUMNS] = E4M3 values times the scales [ROWS, COLUMNS / 32] of their 32 columns.

    Exact where the number is at least 2^-126: it has four significant bits.
    """
    groups = tl.reshape(values, (ROWS, COLUMNS // 32, 32))
    if values.dtype == tl.float8e4b8:
        # CDNA3 has no BF16 arithmetic, so a BF16 product would be an FP32 one, rounded in five instructions. There is
        # nothing to round: the upper half of the FP32 product is the number (under 2^-126 it is cut off at 2^-133).
        product = groups.to(tl.float32) * scales_to_float32(scales)[:, :, None]
        numbers = (product.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        numbers = groups.to(tl.bfloat16) * e8m0_to_bf16(scales)[:, :, None]
    return tl.reshape(numbers, (ROWS, COLUMNS))


@triton.jit
def grouped_dot(
    a_rows, b_rows, b_scale_rows, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """FP32 [BLOCK_M, BLOCK_N] = A . B^T over K, from pointers to the first element of each row of A and of B.

    With b_scale_rows (pointers to the first E8M0 byte of each row of B) B is MXFP8: it becomes BF16 in registers,
    which is exact, so the sum has the same bits as with B dequantised in memory.
    """
    steps = tl.arange(0, BLOCK_K)
    a_ptrs = a_rows[:, None] + steps[None, :]
    b_ptrs = b_rows[:, None] + steps[None, :]
    if b_scale_rows is not None:
        groups = tl.arange(0, BLOCK_K // 32)
        s_ptrs = b_scale_rows[:, None] + groups[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            inside = (steps < K - k)[None, :]
            a = tl.load(a_ptrs, mask=inside, other=0.0)
            b = tl.load(b_ptrs, mask=inside, other=0.0)
        if b_scale_rows is not None:
            if EVEN_K:
                codes = tl.load(s_ptrs)
            else:
                codes = tl.load(s_ptrs, mask=(groups < (K - k) // 32)[None, :], other=127)
            b = dequantize(b, codes, BLOCK_N, BLOCK_K)
            s_ptrs += BLOCK_K // 32
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    return acc
