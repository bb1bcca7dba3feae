"""What stands between the two GEMMs in plain PyTorch: the oracle of `epfuse.stages.activation`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from epfuse.config import Activation, SwiGLUOAI
from epfuse.errors import ConfigError


def swiglu_oai(gate_up: torch.Tensor, activation: SwiGLUOAI) -> torch.Tensor:
    """``[.., 2I]`` (gate half, then up half) -> ``[.., I]`` in the input's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=activation.limit)
    up = up.clamp(-activation.limit, activation.limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + activation.beta)


REFERENCES: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {SwiGLUOAI.kind: swiglu_oai}
"""kind -> function of ``[.., 2I]`` and the activation that gives ``[.., I]`` in the input's dtype."""


def activated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """``[.., 2I]`` (gate half, then up half) -> ``[.., I]`` in the input's dtype.

    Raises:
        ConfigError: there is no reference for such an activation.
    """
    function = REFERENCES.get(activation.kind)
    if function is None:
        raise ConfigError(f"activation is {activation!r}; its kind must be one of {', '.join(REFERENCES)}")
    return function(gate_up, activation)
