"""FP8 quantisation on the device, with one E8M0 scale per group of values.

All rounding is done on float32 bit patterns: the codes are the same on every GPU, whatever its FP8 conversion
instruction does with NaN or saturation, and in Triton's interpreter, whose FP8 casts truncate.
"""

import triton
import triton.language as tl

from epfuse.kernel_cache import cached


@triton.jit
def widen(x):
    """bfloat16, float16 or float32 -> float32, exact.

    By bits for bfloat16: the same instruction on a GPU, and the interpreter's own cast loses bfloat16 subnormals.
    """
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def scale_above(amax):
    """Bit patterns of the largest magnitudes -> (biased E8M0 exponents, whether they are finite)."""
    amax = tl.minimum(amax, 0x7F800000)
    carried = amax + 0x1FFFFF  # into the exponent exactly if the mantissa is above 448's 1.75
    return tl.maximum((carried >> 23) - 8, 0), amax < 0x7F800000


@triton.jit
def shared_scale(bits):
    """float32 bit patterns [.., G] -> (biased E8M0 exponent [..], whether all of the run is finite [..])."""
    # bit patterns order as magnitudes do, with infinity and NaN on top: the maximum can't lose a NaN
    return scale_above(tl.max(bits & 0x7FFFFFFF, axis=-1))


@triton.jit
def inverse_of(scale):
    """2^(127 - scale)."""
    return ((254 - scale) << 23).to(tl.float32, bitcast=True)


@triton.jit
def quantize_block(x, FNUZ: tl.constexpr):
    """float32 [.., G] -> (uint8 E4M3 codes [.., G], uint8 E8M0 bytes [..]); one scale per run of the last axis.

    For runs of 32 bit for bit `epfuse.numerics.mxfp8.encode` under ScaleRounding.CEIL, followed by
    `epfuse.numerics.fnuz.normalize_to_fnuz` if FNUZ: the numbers are the same in both formats.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    scale, finite = shared_scale(bits)

    scaled = magnitude.to(tl.float32, bitcast=True) * tl.expand_dims(inverse_of(scale), -1)
    scaled = tl.minimum(scaled, 448.0)
    # E4M3 normals: drop 20 mantissa bits, to nearest even, and move the exponent's bias from 127 to 7
    pattern = scaled.to(tl.int32, bitcast=True)
    normal = (pattern + 0x7FFFF + ((pattern >> 20) & 1) - (120 << 23)) >> 20
    # E4M3 subnormals, multiples of 2^-9: beside 2^14 the FPU itself rounds there, to nearest even
    subnormal = (scaled + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    codes = tl.where(scaled < 0.015625, subnormal, normal) | ((bits >> 24) & 0x80)

    if FNUZ:
        codes = tl.where(codes == 0x80, 0, codes)
        scale += 1
        codes = tl.where(tl.expand_dims(finite, -1), codes, 0x80)
    else:
        codes = tl.where(tl.expand_dims(finite, -1), codes, 0x7F)
    return codes.to(tl.uint8), tl.where(finite, scale, 255).to(tl.uint8)


@cached
@triton.jit
def quantize_kernel(
    x, codes, scales,
    K, G, row_stride,
    BLOCK_G: tl.constexpr, GROUP: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """codes[t, k], scales[t, g] of x[t, k], G = ceil(K / GROUP) groups a row; a program per row and BLOCK_G groups."""
    token = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    block = widen(tl.load(x + token * row_stride + columns, mask=columns < K, other=0.0))
    code, scale = quantize_block(block, FNUZ)
    tl.store(codes + token * K + columns, code, mask=columns < K)
    tl.store(scales + token * G + groups, scale, mask=groups < G)
