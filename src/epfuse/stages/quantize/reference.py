"""Quantisation of activations in plain PyTorch: the oracle of the kernel and the CPU's path."""

from __future__ import annotations

import torch

from epfuse.errors import DtypeError
from epfuse.numerics.mxfp8 import MXFP8, VALUE_DTYPES, ScaleRounding


def quantize(
    x: torch.Tensor,
    rounding: ScaleRounding = ScaleRounding.FLOOR,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> MXFP8:
    """Quantise per token and 32 values.

    Args:
        x: ``[T, K]`` bfloat16, float16 or float32, K a multiple of 32.
        rounding: rule of the shared exponent.
        dtype: float8_e4m3fn, or float8_e4m3fnuz: the same numbers, for gfx94x.

    Returns:
        ``[T, K]`` values and ``[T, K/32]`` scales.

    Raises:
        ShapeError, DtypeError: x or dtype is not one of these.
    """
    if dtype not in VALUE_DTYPES:
        raise DtypeError(f"dtype is {dtype}; it must be float8_e4m3fn or float8_e4m3fnuz")
    quantized = MXFP8.quantize(x, rounding)
    return quantized.to_fnuz() if dtype == torch.float8_e4m3fnuz else quantized
