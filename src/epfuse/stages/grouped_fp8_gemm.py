"""Device code of the grouped GEMMs whose rows and weights are both FP8 with scales along the reduction."""

import triton
import triton.language as tl


@triton.jit
def scales_to_float32(scales):
    """FP32 scales as they are; E8M0 bytes s as 2^(s - 127), exactly."""
    if scales.dtype == tl.float32:
        numbers = scales
    else:
        field = scales.to(tl.int32) << 23
        field = tl.where(scales == 0, 0x00400000, field)  # 2^-127 is an FP32 subnormal
        field = tl.where(scales == 255, 0x7FC00000, field)  # NaN
        numbers = field.to(tl.float32, bitcast=True)
    return numbers


@triton.jit
def column(tile, index, COLUMNS: tl.constexpr):
    """tile[:, index] of a [ROWS, COLUMNS] tile."""
    return tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == index, tile, 0.0), axis=1)


@triton.jit
def grouped_fp8_dot(
    a_rows, a_scale_rows, b_rows, b_scale_rows, SIZE,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """FP32 [BLOCK_N, BLOCK_M] = B . A^T over SIZE, from pointers to the first element and first scale of each row.

    GROUP columns share a scale, in A as in B. Each group is one native FP8 dot that starts from zero; its FP32 sum is
    multiplied with both scales in FP32 before it is added. The weights B are the tall operand, so that few rows A still
    fill the matrix cores (wgmma multiplies 64 rows at least).
    """
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    inside = tl.arange(0, GROUP)
    groups = tl.arange(0, GROUPS)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, SIZE, BLOCK_K):
        first = k // GROUP + groups
        if EVEN_K:
            a_codes = tl.load(a_scale_rows[:, None] + first[None, :])
            b_codes = tl.load(b_scale_rows[:, None] + first[None, :])
        else:
            real = (first * GROUP < SIZE)[None, :]
            a_codes = tl.load(a_scale_rows[:, None] + first[None, :], mask=real, other=0)
            b_codes = tl.load(b_scale_rows[:, None] + first[None, :], mask=real, other=0)
        a_scales = scales_to_float32(a_codes)
        b_scales = scales_to_float32(b_codes)
        for group in tl.static_range(GROUPS):
            columns = k + group * GROUP + inside
            if EVEN_K:
                a = tl.load(a_rows[:, None] + columns[None, :])
                b = tl.load(b_rows[:, None] + columns[None, :])
            else:
                a = tl.load(a_rows[:, None] + columns[None, :], mask=(columns < SIZE)[None, :], other=0.0)
                b = tl.load(b_rows[:, None] + columns[None, :], mask=(columns < SIZE)[None, :], other=0.0)
            part = tl.dot(b, tl.trans(a))
            acc += part * column(b_scales, group, GROUPS)[:, None] * column(a_scales, group, GROUPS)[None, :]
    return acc
