"""The activation of the FP8 paths in plain PyTorch: the oracle of the kernel."""

from __future__ import annotations

import torch

from epfuse.config import Activation
from epfuse.numerics.mxfp8 import BLOCK
from epfuse.stages.activation_reference import activated
from epfuse.stages.quantize.reference import quantize
from epfuse.stages.quantize.rows import FP8Rows


def activate(
    gate_up: torch.Tensor,
    activation: Activation,
    group: int = BLOCK,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> FP8Rows:
    """What `launch_activate` computes, for every row; the kernel takes the rows of local routes only.

    Args:
        gate_up: ``[N, 2I]`` bf16, fp16 or fp32; gate half, then up half, or ``[N, I]`` where there is no gate.
        activation: between the two GEMMs.
        group: values that share a scale.
        dtype: float8_e4m3fn or float8_e4m3fnuz.

    Returns:
        ``[N, I]``.
    """
    return quantize(activated(gate_up.float(), activation), group, dtype=dtype)
