"""What stands between the two GEMMs where a library multiplies: FP32, few passes over memory, in place where it can."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from epfuse.config import Activation, GELUTanh, ReLU2, SwiGLUOAI
from epfuse.stages.activation_reference import activated


def swiglu_oai_(gate_up: torch.Tensor, activation: SwiGLUOAI) -> torch.Tensor:
    """``[n, 2I]`` -> ``[n, I]`` float32; passes that would change nothing are left out."""
    gate, up = gate_up.float().chunk(2, dim=-1)  # one pass, where a product of two dtypes would widen a copy of up
    if not math.isinf(activation.limit):
        gate.clamp_(max=activation.limit)
        up.clamp_(-activation.limit, activation.limit)
    if activation.beta:
        up.add_(activation.beta)
    if activation.alpha == 1.0:
        return torch.nn.functional.silu(gate, inplace=True).mul_(up)
    return torch.sigmoid(gate * activation.alpha).mul_(gate).mul_(up)


def gelu_tanh_(gate_up: torch.Tensor, activation: GELUTanh) -> torch.Tensor:
    """``[n, 2I]`` -> ``[n, I]`` float32."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate="tanh").mul_(up)


def relu2_(projected: torch.Tensor, activation: ReLU2) -> torch.Tensor:
    """``[n, I]`` -> ``[n, I]`` float32."""
    return projected.float().relu_().square_()


_IN_PLACE: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    SwiGLUOAI.kind: swiglu_oai_,
    GELUTanh.kind: gelu_tanh_,
    ReLU2.kind: relu2_,
}


def activated_(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """``[n, inputs * I]`` in any dtype -> ``[n, I]`` float32; overwrites its argument where that helps.

    An activation without code of its own here runs as in `epfuse.stages.activation_reference`.

    Raises:
        ConfigError: it has none there either.
    """
    own = _IN_PLACE.get(activation.kind)
    return activated(gate_up.float(), activation) if own is None else own(gate_up, activation)
