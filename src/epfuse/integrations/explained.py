"""What a server does with the MoE layers of a model, without epfuse and with it, in one form for every server."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from epfuse.integrations.choice import Choice
from epfuse.policy import LayerPlan


@dataclass(frozen=True)
class OwnExperts:
    """What a server chooses by itself.

    Attributes:
        name: its class of experts.
        effect: one sentence on what that means.
    """

    name: str
    effect: str


@dataclass(frozen=True)
class ChoiceGroup:
    """Layers to which the same happens.

    Attributes:
        layers: their indices, ascending.
        own: what runs them without epfuse.
        ours: epfuse's class of experts in that server.
        choice: what epfuse does, shown by the first of them.
        intermediate: I of these experts.
    """

    layers: tuple[int, ...]
    own: OwnExperts
    ours: str
    choice: Choice
    intermediate: int

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values; bytes are of one layer on one rank."""
        plan = self.choice.plan
        return {
            "layers": list(self.layers),
            "intermediate": self.intermediate,
            "without_epfuse": {"experts": self.own.name, "effect": self.own.effect},
            "with_epfuse": {
                "experts": self.own.name if plan is None else self.ours,
                "reason": self.choice.reason,
                "weights": None if plan is None else plan.storage.value,
                "bytes_per_layer_and_rank": None if plan is None else plan.nbytes,
                "paths": [] if plan is None else paths(plan),
            },
        }


def grouped(choices: Iterable[tuple[int, Choice]], own: OwnExperts, ours: str, intermediate: int) -> list[ChoiceGroup]:
    """Neighbours with one outcome, together.

    Args:
        choices: index of each layer, ascending, and what epfuse does with it.
        own: what runs them without epfuse.
        ours: epfuse's class of experts in that server.
        intermediate: I of all of them.
    """
    groups: list[ChoiceGroup] = []
    for layer, choice in choices:
        if groups and _same(groups[-1].choice, choice):
            groups[-1] = ChoiceGroup((*groups[-1].layers, layer), own, ours, groups[-1].choice, intermediate)
        else:
            groups.append(ChoiceGroup((layer,), own, ours, choice, intermediate))
    return groups


def paths(plan: LayerPlan) -> list[dict[str, Any]]:
    """Path by token count; tiles are left out, so that adjacent ranges with one path are one."""
    found: list[dict[str, Any]] = []
    for part in plan.ranges:
        name = part.decision.path.value
        if found and found[-1]["path"] == name:
            found[-1]["max_tokens"] = part.max_tokens
        else:
            found.append({"min_tokens": part.min_tokens, "max_tokens": part.max_tokens, "path": name})
    return found


def _same(first: Choice, second: Choice) -> bool:
    """Whether two layers of a model share an outcome."""
    if first.plan is None or second.plan is None:
        return first.plan is second.plan and first.reason == second.reason
    return first.reason == second.reason and first.plan.storage is second.plan.storage
