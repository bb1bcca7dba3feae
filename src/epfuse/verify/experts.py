"""Random weights of one rank, expert by expert, so that no more than one rank's weights ever exist."""

from __future__ import annotations

import torch

from epfuse.verify.problem import Problem
from epfuse.weights.experts import ExpertWeights


def rank_weights(problem: Problem, ep_rank: int) -> ExpertWeights:
    """Experts ``[ep_rank * L, (ep_rank + 1) * L)``; a unit-variance input leaves each projection with unit variance.

    Seeded by the global expert id: an expert's weights do not depend on how many ranks there are.
    """
    local, hidden, intermediate = problem.local_experts, problem.hidden, problem.intermediate
    w13 = torch.empty(local, 2 * intermediate, hidden, dtype=problem.dtype, device=problem.device)
    w2 = torch.empty(local, hidden, intermediate, dtype=problem.dtype, device=problem.device)
    rng = torch.Generator(problem.device)
    for slot in range(local):
        rng.manual_seed(problem.seed * 1_000_003 + ep_rank * local + slot)
        for weight in (w13[slot], w2[slot]):
            draw = torch.randn(weight.shape, generator=rng, device=problem.device)
            weight.copy_(draw.mul_(weight.shape[1] ** -0.5))
    return ExpertWeights.dense(w13, w2)
