"""A second, independent float64 oracle: no route table, no expert map, no function of the paths under test."""

from __future__ import annotations

import torch

from epfuse.config import SwiGLUOAI
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.verify.scenarios import Scenario


def add_experts(
    total: torch.Tensor,
    first_expert: int,
    w13: torch.Tensor,
    w2: torch.Tensor,
    scenario: Scenario,
    activation: SwiGLUOAI,
) -> None:
    """Add to ``total`` what the global experts ``first_expert ..`` contribute to the unsharded layer.

    Args:
        total: ``[T, H]`` float64, updated in place.
        first_expert: global id of the expert in ``w13[0]`` and ``w2[0]``.
        w13: ``[n, 2I, H]``, gate rows first.
        w2: ``[n, H, I]``.
        scenario: the call's inputs.
        activation: its parameters.
    """
    for offset in range(w13.shape[0]):
        token, position = torch.nonzero(scenario.topk_ids == first_expert + offset, as_tuple=True)
        if token.numel() == 0:
            continue
        projected = torch.nn.functional.linear(scenario.hidden[token].double(), w13[offset].double())
        half = projected.shape[1] // 2
        gate = torch.minimum(projected[:, :half], projected.new_tensor(activation.limit))
        up = torch.clip(projected[:, half:], -activation.limit, activation.limit)
        inner = gate / (1 + torch.exp(-activation.alpha * gate)) * (up + activation.beta)
        weight = scenario.topk_weights[token, position].double()
        total.index_add_(0, token, weight[:, None] * torch.nn.functional.linear(inner, w2[offset].double()))


def plain_numbers(weights: MXFP8) -> torch.Tensor:
    """``[N, K]`` float64 of one MXFP8 matrix, by torch's own conversions."""
    scales = weights.scales.view(torch.float8_e8m0fnu).double()
    return weights.values.double() * scales.repeat_interleave(32, dim=-1)
