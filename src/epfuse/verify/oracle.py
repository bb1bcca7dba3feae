"""A second, independent float64 oracle: no route table, no expert map, no function of the paths under test."""

from __future__ import annotations

import math

import torch

from epfuse.config import Activation, GELUTanh, ReLU2, SoftcappedSwiGLU, SwiGLUOAI
from epfuse.errors import ConfigError
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.verify.scenarios import Scenario


def add_experts(
    total: torch.Tensor,
    first_expert: int,
    w13: torch.Tensor,
    w2: torch.Tensor,
    scenario: Scenario,
    activation: Activation,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> None:
    """Add to ``total`` what the global experts ``first_expert ..`` contribute to the unsharded layer.

    Args:
        total: ``[T, H]`` float64, updated in place.
        first_expert: global id of the expert in ``w13[0]`` and ``w2[0]``.
        w13: ``[n, 2I, H]``, gate rows first; ``[n, I, H]`` where the activation has no gate.
        w2: ``[n, H, I]``.
        scenario: the call's inputs.
        activation: between the projections.
        gate_up_bias: ``[n, 2I]`` or ``[n, I]``; None for none.
        down_bias: ``[n, H]``; None for none.
    """
    for offset in range(w13.shape[0]):
        token, position = torch.nonzero(scenario.topk_ids == first_expert + offset, as_tuple=True)
        if token.numel() == 0:
            continue
        projected = torch.nn.functional.linear(scenario.hidden[token].double(), w13[offset].double())
        if gate_up_bias is not None:
            projected += gate_up_bias[offset].double()
        row = torch.nn.functional.linear(_between(projected, activation), w2[offset].double())
        if down_bias is not None:
            row += down_bias[offset].double()
        weight = scenario.topk_weights[token, position].double()
        total.index_add_(0, token, weight[:, None] * row)


def _between(projected: torch.Tensor, activation: Activation) -> torch.Tensor:
    """``[n, I]`` float64, from the activations' definitions."""
    if isinstance(activation, ReLU2):
        return torch.where(projected < 0, 0.0, projected) ** 2
    half = projected.shape[1] // 2
    gate, up = projected[:, :half], projected[:, half:]
    if isinstance(activation, SwiGLUOAI):
        gate = torch.minimum(gate, projected.new_tensor(activation.limit))
        up = torch.clip(up, -activation.limit, activation.limit)
        return gate / (1 + torch.exp(-activation.alpha * gate)) * (up + activation.beta)
    if isinstance(activation, GELUTanh):
        return gate / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    if isinstance(activation, SoftcappedSwiGLU):
        linear = activation.gate_cap * torch.tanh(gate / activation.gate_cap)
        return linear / (1 + torch.exp(-gate)) * (activation.up_cap * torch.tanh(up / activation.up_cap))
    raise ConfigError(f"activation is {activation!r}; the second oracle has no definition of it")


def plain_numbers(weights: MXFP8) -> torch.Tensor:
    """``[N, K]`` float64 of one MXFP8 matrix, by torch's own conversions."""
    scales = weights.scales.view(torch.float8_e8m0fnu).double()
    return weights.values.double() * scales.repeat_interleave(32, dim=-1)
