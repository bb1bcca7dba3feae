"""How a benchmark's router spreads tokens over experts."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from epfuse.arguments import checks_enums
from epfuse.config import LayerShape
from epfuse.errors import ConfigError

STEEPEST = 8.0
"""Largest s of a Zipf routing: n^-s of a thousand experts is still a float32."""


class RoutingKind(enum.Enum):
    """The distribution that a token's K different experts are drawn from."""

    UNIFORM = "uniform"
    """Every expert is equally likely."""
    ZIPF = "zipf"
    """The n-th most popular expert is drawn in proportion to n^-s. Experts are dealt to ranks in the order of their
    popularity, so the rank that is measured, the first, holds the most popular one: the others wait for it."""
    ALL_TO = "all-to"
    """Every token goes to the same n experts of this rank."""


@checks_enums
@dataclass(frozen=True)
class Routing:
    """One way to route.

    Args:
        kind: the distribution.
        parameter: s of ZIPF, n of ALL_TO, 0 for UNIFORM.
    """

    kind: RoutingKind
    parameter: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Routing:
        """``uniform``, ``zipf:S`` (S in 0..8) or ``all-to:N`` (N at least 1).

        Raises:
            ConfigError: it is none of these.
        """
        name, colon, value = text.partition(":")
        refused = ConfigError(f"routing is {text!r}; it must be uniform, zipf:S or all-to:N (zipf:1.2, all-to:2)")
        if name == RoutingKind.UNIFORM.value and not colon:
            return cls(RoutingKind.UNIFORM)
        try:
            if name == RoutingKind.ZIPF.value and 0 <= float(value) <= STEEPEST:
                return cls(RoutingKind.ZIPF, float(value))
            if name == RoutingKind.ALL_TO.value and int(value) >= 1:
                return cls(RoutingKind.ALL_TO, float(int(value)))
        except ValueError:
            raise refused from None
        raise refused

    def __str__(self) -> str:
        return self.kind.value if self.kind is RoutingKind.UNIFORM else f"{self.kind.value}:{self.parameter:g}"

    def check(self, shape: LayerShape) -> None:
        """Whether a layer can be routed so.

        Raises:
            ConfigError: ALL_TO more experts than are local.
        """
        if self.kind is RoutingKind.ALL_TO and self.parameter > shape.local_experts:
            raise ConfigError(f"routing is {self}; this rank has {shape.local_experts} experts")

    def draw(self, shape: LayerShape, tokens: int, variant: int, rng: torch.Generator) -> torch.Tensor:
        """``[T, K]`` int64 global expert ids; this rank has the experts 0..L-1.

        Args:
            shape: the layer's sizes.
            tokens: T.
            variant: which of the draws that are timed in turn; ALL_TO takes other experts in each.
            rng: on the CPU, so that draws don't depend on the device.
        """
        if self.kind is RoutingKind.ALL_TO:
            return self._same_experts(shape, tokens, variant, rng)
        popularity = torch.ones(shape.experts)
        if self.kind is RoutingKind.ZIPF:
            popularity = _dealt(shape).pow(-self.parameter)
        return _distinct(popularity.expand(tokens, -1), shape.top_k, rng)

    def _same_experts(self, shape: LayerShape, tokens: int, variant: int, rng: torch.Generator) -> torch.Tensor:
        """K of the n experts; if n < K, all of them, and other ranks' experts for the rest.

        If the other ranks have too few, the rest goes to the n experts again.
        """
        count, local = int(self.parameter), shape.local_experts
        chosen = (variant * count + torch.arange(count)) % local
        if count >= shape.top_k:
            return chosen[_distinct(torch.ones(tokens, count), shape.top_k, rng)]
        rest = shape.top_k - count
        if shape.experts - local >= rest:
            others = local + _distinct(torch.ones(tokens, shape.experts - local), rest, rng)
        else:
            others = chosen.repeat(-(-rest // count))[:rest].expand(tokens, -1)
        return torch.cat([chosen.expand(tokens, -1), others], dim=1)


def _distinct(popularity: torch.Tensor, count: int, rng: torch.Generator) -> torch.Tensor:
    return torch.multinomial(popularity, count, replacement=False, generator=rng)


def _dealt(shape: LayerShape) -> torch.Tensor:
    """``[E]``: each expert's place in the order of popularity, from 1.

    Rank p has the places p + 1, p + 1 + P, p + 1 + 2P, .. in an order of its own: a rank whose first slot were always
    the fullest would flatter a kernel that starts with it.
    """
    ranks = shape.experts // shape.local_experts
    shuffle = torch.randperm(shape.local_experts, generator=torch.Generator().manual_seed(0))
    return (1 + torch.arange(ranks)[:, None] + ranks * shuffle[None, :]).flatten().float()
