"""One tensor's bytes under another dtype, where both mean the same numbers."""

from __future__ import annotations

import torch

from epfuse.errors import DtypeError

_E8M0_BYTES = {torch.uint8, torch.float8_e8m0fnu}
"""A scale byte and the number that it stands for: the same bits."""


def reinterpret(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` as ``dtype`` without changing a bit or a number; what every load goes through in place of a cast.

    A cast of E8M0 scales to uint8 turns 2^-7 into 0, and one of FP8 codes to BF16 loses their scales. So only uint8
    and float8_e8m0fnu, which are the same bytes, stand for each other. Raw uint8 is not taken for FP8 codes: the bytes
    don't tell E4M3FN from E4M3FNUZ. Nothing is rounded or widened either: whoever wants that converts first.

    Args:
        name: what an error calls the tensor.
        tensor: any shape and device.
        dtype: what it must have.

    Returns:
        ``tensor`` itself, or a view of it.

    Raises:
        DtypeError: the two dtypes are not the same bits.
    """
    if tensor.dtype == dtype:
        return tensor
    if {tensor.dtype, dtype} == _E8M0_BYTES:
        return tensor.view(dtype)
    fix = (
        "FP8 and its scales are made or undone by ExpertWeights.quantize and MXFP8.dequantize, not by a load"
        if 1 in (tensor.element_size(), dtype.itemsize)
        else f"convert one side first, e.g. the model with .to({str(tensor.dtype).removeprefix('torch.')})"
    )
    raise DtypeError(f"{name} has dtype {tensor.dtype}; {dtype} is needed, and a load casts nothing: {fix}")
