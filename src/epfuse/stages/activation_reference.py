"""What stands between the two GEMMs in plain PyTorch: the oracle of `epfuse.stages.activation`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from epfuse.config import Activation, GELUTanh, ReLU2, SoftcappedSwiGLU, SwiGLUOAI
from epfuse.errors import ConfigError


def swiglu_oai(gate_up: torch.Tensor, activation: SwiGLUOAI) -> torch.Tensor:
    """``[.., 2I]`` (gate half, then up half) -> ``[.., I]`` in the input's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=activation.limit)
    up = up.clamp(-activation.limit, activation.limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + activation.beta)


def gelu_tanh(gate_up: torch.Tensor, activation: GELUTanh) -> torch.Tensor:
    """``[.., 2I]`` (gate half, then up half) -> ``[.., I]`` in the input's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def softcapped_swiglu(gate_up: torch.Tensor, activation: SoftcappedSwiGLU) -> torch.Tensor:
    """``[.., 2I]`` (gate half, then up half) -> ``[.., I]`` in the input's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    linear = torch.tanh(gate / activation.gate_cap) * activation.gate_cap
    return linear * torch.sigmoid(gate) * (torch.tanh(up / activation.up_cap) * activation.up_cap)


def relu2(projected: torch.Tensor, activation: ReLU2) -> torch.Tensor:
    """``[.., I]`` -> ``[.., I]`` in the input's dtype."""
    return torch.nn.functional.relu(projected).square()


REFERENCES: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    SwiGLUOAI.kind: swiglu_oai,
    GELUTanh.kind: gelu_tanh,
    SoftcappedSwiGLU.kind: softcapped_swiglu,
    ReLU2.kind: relu2,
}
"""kind -> function of ``[.., inputs * I]`` and the activation that gives ``[.., I]`` in the input's dtype."""


def activated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """``[.., 2I]`` (gate half, then up half), or ``[.., I]`` without a gate -> ``[.., I]`` in the input's dtype.

    Raises:
        ConfigError: there is no reference for such an activation.
    """
    function = REFERENCES.get(activation.kind)
    if function is None:
        raise ConfigError(f"activation is {activation!r}; its kind must be one of {', '.join(REFERENCES)}")
    return function(gate_up, activation)
