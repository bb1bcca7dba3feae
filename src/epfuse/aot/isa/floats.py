"""Float arithmetic on 32-bit patterns: round to nearest even, subnormals kept, as the kernels' mode says."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from epfuse.aot.isa.operands import SIGN, Value

Doubles = NDArray[np.float64]
TINY = np.float32(2.0**-126)


def f32(bits: Value) -> Value:
    """Bits as floats."""
    return bits.view(np.float32)


def bits(value: NDArray[np.float32]) -> Value:
    """Floats as bits."""
    return np.asarray(value, np.float32).view(np.uint32)


def fused(a: Value, b: Value, c: Value) -> Value:
    """``a * b + c``, rounded once.

    The product of two floats is exact in a double. The sum is rounded to odd, after which rounding to a float is
    rounding the exact sum (Boldo and Melquiond, 2008).
    """
    product = f32(a).astype(np.float64) * f32(b).astype(np.float64)
    return bits(odd_sum(product, f32(c).astype(np.float64)).astype(np.float32))


def odd_sum(left: Doubles, right: Doubles) -> Doubles:
    """The sum, rounded to the odd one of its two neighbours if it is not exact."""
    total = np.asarray(left + right)
    back = total - left
    error = (left - (total - back)) + (right - back)
    wrong = (error != 0) & np.isfinite(total)
    if wrong.any():
        pattern = total.view(np.int64)
        step = np.where((error > 0) == (total > 0), 1, -1)
        total = np.where(wrong & (pattern & 1 == 0), pattern + step, pattern).view(np.float64)
    return total


def minimum(a: Value, b: Value) -> Value:
    """The smaller one; of a number and a NaN the number, and -0 is smaller than +0."""
    return _better(a, b, np.less, SIGN)


def maximum(a: Value, b: Value) -> Value:
    """The larger one; of a number and a NaN the number, and +0 is larger than -0."""
    return _better(a, b, np.greater, np.uint32(0))


def _better(a: Value, b: Value, better: np.ufunc, preferred_zero: np.uint32) -> Value:
    x, y = f32(a), f32(b)
    zeros = (x == 0) & (y == 0)
    takes_a = np.isnan(y) | better(x, y) | (zeros & (a == preferred_zero))
    return np.where(takes_a & ~np.isnan(x), a, b)


def reciprocal(a: Value) -> Value:
    """``1 / a``; subnormals count as zeros on either side."""
    return bits(_flushed(np.float32(1) / _flushed(f32(a))))


def exponential(a: Value) -> Value:
    """``2 ** a``, the float nearest to it; subnormals count as zeros on either side."""
    return bits(_flushed(np.exp2(_flushed(f32(a)).astype(np.float64)).astype(np.float32)))


def _flushed(value: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(np.abs(value) < TINY, np.copysign(np.float32(0), value), value)


def scaled(a: Value, power: Value) -> Value:
    """``a * 2 ** power`` with ``power`` a signed integer."""
    return bits(np.ldexp(f32(a).astype(np.float64), np.clip(power.view(np.int32), -400, 400)).astype(np.float32))


def exponent(value: Value) -> NDArray[np.int64]:
    """The exponent's field."""
    return (np.asarray(value) >> np.uint32(23) & np.uint32(255)).astype(np.int64)


def division_scale(a: Value, denominator: Value, numerator: Value) -> tuple[Value, NDArray[np.bool_]]:
    """First step of a division: ``a``, which is the denominator or the numerator, scaled so that nothing overflows.

    Returns:
        The scaled value, and whether the quotient must be scaled back.
    """
    a, denominator, numerator = np.broadcast_arrays(*(np.asarray(each) for each in (a, denominator, numerator)))
    d, n = f32(np.ascontiguousarray(denominator)), f32(np.ascontiguousarray(numerator))
    none = (d == 0) | (n == 0)
    large = ~none & (exponent(numerator) - exponent(denominator) >= 96)
    rest = ~none & ~large
    subnormal = rest & (exponent(denominator) == 0)
    rest &= ~subnormal
    with np.errstate(all="ignore"):
        quotient = np.abs(n.astype(np.float64) / d.astype(np.float64))
    small = rest & (quotient < float(TINY)) & (quotient > 0)
    # the reciprocal would be subnormal; the pseudocode scales up here, which would overflow
    slow = rest & (np.abs(d) > np.float32(2.0**126)) & np.isfinite(d)
    down = slow & (~small | (a == denominator))
    rest &= ~small & ~slow
    tiny = rest & (exponent(numerator) <= 23)
    up = (large & (a == denominator)) | subnormal | (small & ~slow & (a == numerator)) | tiny
    power = np.where(up, 64, np.where(down, -64, 0)).astype(np.int32).view(np.uint32)
    value = np.where(up | down, scaled(np.ascontiguousarray(a), power), a)
    return np.where(none, np.uint32(0x7FC00000), value), large | small


def division_step(a: Value, b: Value, c: Value, scale: NDArray[np.bool_]) -> Value:
    """A fused multiply-add; where ``scale`` it undoes what `division_scale` did to the quotient ``c``."""
    plain = fused(a, b, c)
    if not scale.any():
        return plain
    power = np.where(exponent(c) > 127, 64, -64).astype(np.int32).view(np.uint32)
    return np.where(scale, scaled(np.broadcast_to(plain, scale.shape).copy(), power), plain)


def division_fixup(quotient: Value, denominator: Value, numerator: Value) -> Value:
    """Last step of a division: the special cases, and the sign."""
    quotient, denominator, numerator = (
        np.ascontiguousarray(each) for each in np.broadcast_arrays(quotient, denominator, numerator)
    )
    d, n = f32(denominator), f32(numerator)
    sign = (denominator ^ numerator) & SIGN
    infinity = np.uint32(0x7F800000)
    nan = np.uint32(0xFFC00000)
    quiet = np.uint32(0x00400000)
    below = exponent(numerator) - exponent(denominator) < -150
    cases = [
        (np.isnan(n), numerator | quiet),
        (np.isnan(d), denominator | quiet),
        (((d == 0) & (n == 0)) | (np.isinf(d) & np.isinf(n)), np.full_like(sign, nan)),
        ((d == 0) | np.isinf(n), sign | infinity),
        (np.isinf(d) | (n == 0) | below, sign),
    ]
    return np.select([case for case, _ in cases], [value for _, value in cases], (quotient & ~SIGN) | sign)


def to_unsigned(a: Value) -> Value:
    """A float cut to an integer in 0..2**32-1; NaN is 0."""
    value = np.nan_to_num(f32(a).astype(np.float64), nan=0.0, posinf=2.0**32, neginf=0.0)
    return np.clip(value, 0, 2.0**32 - 1).astype(np.uint64).astype(np.uint32)


def from_unsigned(a: Value) -> Value:
    """An unsigned integer as the nearest float."""
    return bits(a.astype(np.float32))


def to_half(a: Value) -> Value:
    """A float as FP16 in the low half; the high half is zero."""
    return np.asarray(f32(a).astype(np.float16)).view(np.uint16).astype(np.uint32)


def from_half(a: Value) -> Value:
    """FP16 of the low half as a float."""
    return bits((np.asarray(a) & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16).astype(np.float32))


def _fp8_table() -> NDArray[np.float32]:
    """E4M3 FNUZ: bias 8, no infinities, no -0; its code is the only NaN."""
    codes = np.arange(256)
    power, fraction = codes >> 3 & 15, codes & 7
    value = np.where(power == 0, fraction * 2.0**-10, (8 + fraction) * 2.0 ** (power - 11.0))
    value = np.where(codes >> 7, -value, value)
    value[0x80] = np.nan
    return value.astype(np.float32)


FP8 = _fp8_table()
"""What each E4M3 FNUZ code is worth."""


def from_fp8(a: Value, byte: int) -> Value:
    """A byte of each register, E4M3 FNUZ, as a float."""
    return bits(FP8[np.asarray(a) >> np.uint32(8 * byte) & np.uint32(255)])
