"""Quantisation of activations in plain PyTorch: the oracle of the kernel."""

from __future__ import annotations

import torch

from epfuse.arguments import checks_enums
from epfuse.errors import DtypeError
from epfuse.numerics.e8m0 import NAN_BYTE, ScaleRounding, inverse_scales, magnitude_bits, scale_bytes
from epfuse.numerics.fnuz import FN_NAN, normalize_to_fnuz
from epfuse.numerics.mxfp8 import BLOCK, E4M3_MAX, VALUE_DTYPES
from epfuse.stages.grid import pieces
from epfuse.stages.quantize.rows import FP8Rows


@checks_enums
def quantize(x: torch.Tensor, group: int = BLOCK, dtype: torch.dtype = torch.float8_e4m3fn) -> FP8Rows:
    """Quantise per row and ``group`` values, under ScaleRounding.CEIL; in groups of 32 as MXFP8 (`encode` there).

    Args:
        x: ``[N, K]`` bfloat16, float16 or float32.
        group: values that share a scale.
        dtype: float8_e4m3fn, or float8_e4m3fnuz: the same numbers, for gfx94x.

    Raises:
        DtypeError: dtype is not one of these.
    """
    if dtype not in VALUE_DTYPES:
        raise DtypeError(f"dtype is {dtype}; it must be float8_e4m3fn or float8_e4m3fnuz")
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -columns % group)).view(rows, pieces(columns, group), group)
    scales = scale_bytes(magnitude_bits(padded).amax(-1), ScaleRounding.CEIL)
    scaled = (padded * inverse_scales(scales)[..., None]).clamp_(-E4M3_MAX, E4M3_MAX)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8).masked_fill_((scales == NAN_BYTE)[..., None], FN_NAN)
    values = codes.flatten(1)[:, :columns].contiguous().view(torch.float8_e4m3fn)
    scale_codes = scales.to(torch.uint8)
    if dtype == torch.float8_e4m3fnuz:
        values, scale_codes = normalize_to_fnuz(values, scale_codes)
    return FP8Rows(values, scale_codes, group)
