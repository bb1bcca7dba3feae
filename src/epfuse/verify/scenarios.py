"""The inputs of the suite: one ordinary routing and those that break expert-parallel layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from epfuse.verify.problem import Problem

ROUTED_SCALE = 2.0
"""A token's router weights sum to this, as MiniMax-M3's do (transformers: routed_scaling_factor)."""

OUTLIER = "outlier channel"


@dataclass(frozen=True)
class Scenario:
    """One call's inputs, the same on every rank.

    Attributes:
        name: what is special about them.
        hidden: ``[T, H]`` in the problem's dtype.
        topk_weights: ``[T, K]`` float32.
        topk_ids: ``[T, K]`` int32 or int64.
    """

    name: str
    hidden: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor

    @property
    def tokens(self) -> int:
        """T."""
        return self.hidden.shape[0]


@dataclass(frozen=True)
class _Draw:
    """Random inputs of one call, drawn on the CPU so that they do not depend on the device."""

    problem: Problem
    tokens: int
    rng: torch.Generator

    def hidden(self) -> torch.Tensor:
        return torch.randn(self.tokens, self.problem.hidden, generator=self.rng)

    def weights(self) -> torch.Tensor:
        scores = torch.rand(self.tokens, self.problem.top_k, generator=self.rng) + 0.1
        return ROUTED_SCALE * scores / scores.sum(dim=1, keepdim=True)

    def distinct(self, popularity: torch.Tensor) -> torch.Tensor:
        """``[T, K]`` int64: K different experts a token, drawn with probabilities in proportion to ``popularity``."""
        return torch.multinomial(
            popularity.expand(self.tokens, -1), self.problem.top_k, replacement=False, generator=self.rng
        )

    def uniform(self) -> torch.Tensor:
        return self.distinct(torch.ones(self.problem.experts))

    def below(self, high: int) -> torch.Tensor:
        """``[T, K]`` int64, uniform in [0, high)."""
        return torch.randint(high, (self.tokens, self.problem.top_k), generator=self.rng)


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _uniform(draw: _Draw) -> Inputs:
    return draw.hidden(), draw.weights(), draw.uniform().int()


def _skewed(draw: _Draw) -> Inputs:
    """Zipf's law: the n-th most popular expert is drawn in proportion to 1/n."""
    experts = draw.problem.experts
    order = torch.randperm(experts, generator=draw.rng)
    return draw.hidden(), draw.weights(), draw.distinct(1.0 / (1.0 + order)).int()


def _one_expert(draw: _Draw) -> Inputs:
    """Every token has one live route, all to the same expert."""
    ids = torch.full((draw.tokens, draw.problem.top_k), -1)
    ids[:, -1] = draw.problem.experts // 2
    return draw.hidden(), draw.weights(), ids


def _one_rank(draw: _Draw) -> Inputs:
    """All routes to the last rank: the others have none. With one rank, no route at all."""
    problem = draw.problem
    if problem.ep_size == 1:
        ids = torch.full((draw.tokens, problem.top_k), -1)
    else:
        ids = draw.below(problem.local_experts) + problem.experts - problem.local_experts
    return draw.hidden(), draw.weights(), ids.int()


def _duplicates(draw: _Draw) -> Inputs:
    """An expert more than once in a token: each time counts."""
    ids = draw.uniform()
    ids[:, 1:] = torch.where(torch.rand(ids[:, 1:].shape, generator=draw.rng) < 0.7, ids[:, :1], ids[:, 1:])
    return draw.hidden(), draw.weights(), ids


def _foreign_ids(draw: _Draw) -> Inputs:
    """Ids that name no expert are skipped: -1, others outside [0, E), and one that wraps to 0 in 32 bits."""
    ids = draw.uniform()
    foreign = torch.tensor([-1, -7, draw.problem.experts, 2**31 - 1, 2**32])
    pick = foreign[draw.below(len(foreign))]
    return draw.hidden(), draw.weights(), torch.where(torch.rand(ids.shape, generator=draw.rng) < 0.4, pick, ids)


def _nan_weight(draw: _Draw) -> Inputs:
    """A NaN router weight reaches its own token and no other."""
    weights = draw.weights()
    weights[draw.tokens // 2, 0] = torch.nan
    return draw.hidden(), weights, draw.uniform().int()


def _clamped(draw: _Draw) -> Inputs:
    """Projections with a standard deviation of 4: the clamp at 7 bites on 4 % of the gates and 8 % of the ups."""
    return 4.0 * draw.hidden(), draw.weights(), draw.uniform().int()


def _outlier_channel(draw: _Draw) -> Inputs:
    hidden = draw.hidden()
    hidden[:, draw.problem.hidden // 3] *= 1000.0
    return hidden, draw.weights(), draw.uniform().int()


def _zeros(draw: _Draw) -> Inputs:
    """A block of zeros in every token, and a token of zeros, whose output is exactly zero."""
    hidden = draw.hidden()
    hidden[:, -32:] = 0.0
    hidden[-1] = 0.0
    return hidden, draw.weights(), draw.uniform().int()


KINDS: dict[str, Callable[[_Draw], Inputs]] = {
    "uniform": _uniform,
    "skewed": _skewed,
    "one expert": _one_expert,
    "one rank": _one_rank,
    "duplicates": _duplicates,
    "foreign ids": _foreign_ids,
    "NaN weight": _nan_weight,
    "clamped": _clamped,
    OUTLIER: _outlier_channel,
    "zeros": _zeros,
}


def make_scenarios(problem: Problem) -> list[Scenario]:
    """Every kind at every token count, reproducible from the problem's seed."""
    return [
        draw_scenario(problem, tokens, name, problem.seed * 1_000_003 + tokens * 101 + index)
        for tokens in problem.tokens
        for index, name in enumerate(KINDS)
    ]


def draw_scenario(problem: Problem, tokens: int, name: str, seed: int) -> Scenario:
    """One of `KINDS`, reproducible from ``seed``."""
    hidden, weights, ids = KINDS[name](_Draw(problem, tokens, torch.Generator().manual_seed(seed)))
    device = problem.device
    return Scenario(name, hidden.to(device, problem.dtype), weights.to(device), ids.to(device))
