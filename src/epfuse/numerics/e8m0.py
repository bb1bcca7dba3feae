"""E8M0 block scales: one byte s per block is the factor 2^(s - 127); 255 is NaN, and there is no zero and no sign.

Source: OCP Microscaling Formats (MX) v1.0, scale format E8M0.
"""

from __future__ import annotations

import enum

import torch

from epfuse.arguments import checks_enums
from epfuse.errors import DtypeError
from epfuse.operands import require_plain

NAN_BYTE = 255
"""The NaN scale: every value of its block is NaN."""

_FLOAT32_INFINITY = 0x7F800000  # bit pattern; a magnitude at or above it is an infinity or a NaN
_FLOAT32_MANTISSA_BITS = 23
# E4M3FN's largest value is 448 = 1.75 * 2^8
_E4M3_MAX_EXPONENT = 8
# Added to a float32 bit pattern, carries into the exponent field exactly if the mantissa is above 1.75.
_CARRY_ABOVE_MAX_MANTISSA = (1 << 21) - 1


class ScaleRounding(enum.Enum):
    """How the shared exponent of a block follows from amax, its largest magnitude."""

    FLOOR = "floor"
    """``floor(log2(amax)) - 8``, the rule of MX v1.0. A magnitude in (448, 512) times the scale saturates to 448."""
    CEIL = "ceil"
    """``ceil(log2(amax / 448))``: the smallest power of two under which no value saturates (DeepGEMM, newer vLLM)."""


def magnitude_bits(x: torch.Tensor) -> torch.Tensor:
    """``|x|`` as float32 bit patterns (int32), which order as the magnitudes do, with infinity and NaN on top.

    Integers rather than floats so that an exponent is read off, never computed by a rounded logarithm, and so that a
    maximum needs no rule for NaN.

    Args:
        x: bfloat16, float16 or float32, any shape.

    Returns:
        int32 of the same shape, new memory.
    """
    return x.to(torch.float32).view(torch.int32) & 0x7FFFFFFF


@checks_enums
def scale_bytes(amax_bits: torch.Tensor, rounding: ScaleRounding) -> torch.Tensor:
    """Scale byte of each block from the block's largest magnitude.

    Exponents below the E8M0 range are clamped to byte 0: blocks of zeros and blocks of values below 2^-118 get 0. The
    upper end is out of reach: the largest float32 gives 246 (floor) or 247 (ceil), so 254 never arises.

    Args:
        amax_bits: int32, maximum of `magnitude_bits` over each block.
        rounding: the rule.

    Returns:
        int32 of the same shape, 0..247, or 255 for a block that holds an infinity or a NaN.

    Raises:
        ConfigError: rounding is no ScaleRounding.
    """
    amax_bits = amax_bits.clamp(max=_FLOAT32_INFINITY)  # or the carry would overflow on a NaN
    carried = amax_bits + _CARRY_ABOVE_MAX_MANTISSA if rounding is ScaleRounding.CEIL else amax_bits
    exponent = ((carried >> _FLOAT32_MANTISSA_BITS) - _E4M3_MAX_EXPONENT).clamp(min=0)
    return exponent.masked_fill(amax_bits == _FLOAT32_INFINITY, NAN_BYTE)


def inverse_scales(scales: torch.Tensor) -> torch.Tensor:
    """2^(127 - s) in float32, exact and normal.

    Args:
        scales: int32, 0..253 (254 would be a subnormal, which `scale_bytes` never asks for) or 255, whose result is
            of no use.

    Returns:
        float32 of the same shape.
    """
    return ((254 - scales).clamp(min=0) << _FLOAT32_MANTISSA_BITS).view(torch.float32)


def decode_scales(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scale bytes as numbers; exact in bfloat16, float32 and float64, byte 0 (2^-127, a subnormal there) included.

    Args:
        scales: uint8 or float8_e8m0fnu, any shape.
        dtype: bfloat16, float32 or float64.

    Returns:
        Of ``dtype`` and the same shape; NaN for byte 255.

    Raises:
        ConfigError, LayoutError: ``scales`` is no plain tensor (`epfuse.operands.require_plain`).
        DtypeError: ``scales`` is of another dtype.
    """
    return as_e8m0_bytes("scales", scales).view(torch.float8_e8m0fnu).to(dtype)


def as_e8m0_bytes(name: str, scales: torch.Tensor) -> torch.Tensor:
    """``scales`` as uint8, a view.

    Args:
        name: what an error calls the argument.
        scales: uint8 or float8_e8m0fnu, any shape.

    Returns:
        uint8 of the same shape, in the memory of ``scales``.

    Raises:
        ConfigError, LayoutError: ``scales`` is no plain tensor (`epfuse.operands.require_plain`).
        DtypeError: ``scales`` is of another dtype.
    """
    require_plain(name, scales)
    if scales.dtype == torch.uint8:
        return scales
    if scales.dtype == torch.float8_e8m0fnu:
        return scales.view(torch.uint8)
    raise DtypeError(f"{name} has dtype {scales.dtype}; E8M0 scales are uint8 or float8_e8m0fnu")
