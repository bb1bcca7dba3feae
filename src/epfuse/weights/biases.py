"""The biases of a layer's projections: small, in float32 whatever the weights are in, and the same for every format."""

from __future__ import annotations

import torch

from epfuse.errors import DeviceError, DtypeError, LayoutError, ShapeError
from epfuse.operands import require_plain
from epfuse.weights.dense import DENSE_DTYPES


def checked_bias(
    name: str, bias: torch.Tensor | None, size: tuple[int, int], device: torch.device
) -> torch.Tensor | None:
    """A bias in float32, itself where it is that; None of None.

    Args:
        name: what errors call it.
        bias: contiguous, in a dtype of dense weights.
        size: (L, outputs) of the projection.
        device: where the weights are.

    Raises:
        ConfigError, ShapeError, DtypeError, DeviceError, LayoutError: it is none of these weights.
    """
    if bias is None:
        return None
    require_plain(name, bias)
    if tuple(bias.shape) != size:
        raise ShapeError(f"{name} has shape {tuple(bias.shape)}; beside these weights it must be {size}")
    if bias.dtype not in DENSE_DTYPES:
        raise DtypeError(f"{name} has dtype {bias.dtype}; it must be bfloat16, float16 or float32")
    if bias.device != device:
        raise DeviceError(f"{name} is on {bias.device} and the weights on {device}; all must be on one device")
    if not bias.is_contiguous():
        raise LayoutError(f"{name} has strides {bias.stride()}; it must be contiguous (call .contiguous() at load)")
    return bias if bias.dtype == torch.float32 else bias.detach().float()
