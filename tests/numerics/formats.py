"""Oracles of the number formats, from their definitions, and inputs that reach every corner of them."""

from __future__ import annotations

import math

import torch

from epfuse.numerics.mxfp8 import ScaleRounding

FORMATS = {torch.float8_e4m3fn: (7, 448.0), torch.float8_e4m3fnuz: (8, 240.0)}
"""dtype -> exponent bias, largest finite value."""


def e4m3_value(code: int, dtype: torch.dtype) -> float:
    """The number an E4M3 byte stands for, from sign, exponent and mantissa (OCP OFP8 v1.0; FNUZ: one bias more)."""
    bias = FORMATS[dtype][0]
    if dtype == torch.float8_e4m3fn and code & 0x7F == 0x7F:
        return math.nan
    if dtype == torch.float8_e4m3fnuz and code == 0x80:
        return math.nan
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = math.ldexp(8 + mantissa, exponent - bias - 3) if exponent else math.ldexp(mantissa, 1 - bias - 3)
    return math.copysign(magnitude, -1.0 if code & 0x80 else 1.0)


def e8m0_value(byte: int) -> float:
    """The number a scale byte stands for (OCP MX v1.0)."""
    return math.nan if byte == 255 else math.ldexp(1.0, byte - 127)


def expected_encoding(block: list[float], rounding: ScaleRounding) -> tuple[list[int], int]:
    """E4M3FN codes and scale byte of 32 finite numbers by search: the nearest of all 127 magnitudes, ties to even."""
    amax = max(map(abs, block))
    exponents = range(-127, 128)
    if rounding is ScaleRounding.FLOOR:
        # the largest e with 2^e <= amax / 2^8
        fitting = [e for e in exponents if math.ldexp(1.0, e + 8) <= amax]
        exponent = fitting[-1] if fitting else -127
    else:
        exponent = next(e for e in exponents if amax <= math.ldexp(448.0, e))
    magnitudes = [e4m3_value(code, torch.float8_e4m3fn) for code in range(127)]
    codes = []
    for x in block:
        scaled = min(math.ldexp(abs(x), -exponent), 448.0)
        nearest = min(range(127), key=lambda code: (abs(magnitudes[code] - scaled), code & 1))
        codes.append(nearest | (0x80 if math.copysign(1.0, x) < 0 else 0))
    return codes, exponent + 127


def corner_rows(dtype: torch.dtype = torch.float32, columns: int = 64) -> torch.Tensor:
    """``[T, columns]`` rows, each with one kind of difficulty for a quantiser; finite rows first, see `FINITE_ROWS`."""
    g = torch.Generator().manual_seed(5)
    normal = torch.randn(1, columns, generator=g)
    uniform = torch.rand(1, columns, generator=g)
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    outlier = normal.clone()
    outlier[0, 7] *= 1000
    ties = torch.arange(columns).view(1, -1) % 32 / 16 + 449.0 - (torch.arange(columns).view(1, -1) % 32) * 14
    steps = smallest * torch.arange(columns, dtype=torch.float64).view(1, -1)
    signed_zeros = torch.zeros(1, columns)
    signed_zeros[0, ::2] = -0.0
    finite = [
        normal,
        normal * 1e-6,
        outlier,
        ties,
        torch.linspace(-512, 512, columns).view(1, -1),
        torch.exp2(-20 * uniform) * 448,
        signed_zeros,
        steps.to(torch.float32),
        -steps.to(torch.float32),
        uniform * info.smallest_normal,
        uniform * info.max,
        torch.full((1, columns), info.max),
        torch.full((1, columns), smallest),
    ]
    broken = []
    for value in (float("nan"), float("inf"), -float("inf")):
        row = normal.clone()
        row[0, 40] = value
        broken.append(row)
    both = normal.clone()
    both[0, 0], both[0, 1] = float("nan"), float("inf")
    return torch.cat([*finite, *broken, both]).to(dtype)


FINITE_ROWS = 13
"""Rows of `corner_rows` without an infinity or a NaN."""


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal numbers, NaN in the same places, zeros of the same sign."""
    a, b = a.cpu().double(), b.cpu().double()
    numbers = torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5)) and torch.equal(a.isnan(), b.isnan())
    return numbers and torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())
