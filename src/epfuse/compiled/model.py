"""The different layers of a model, as their kernels are concerned."""

from __future__ import annotations

from dataclasses import dataclass, replace

from epfuse.arguments import checks_enums
from epfuse.expert_map import experts_of_rank
from epfuse.families.family import CallKind
from epfuse.integrations.choice import choose
from epfuse.policy.facts import model_facts
from epfuse.policy.layer import LayerPlan
from epfuse.target import Target
from epfuse.weights.model_config import ExpertModel


@dataclass(frozen=True)
class ModelLayers:
    """What there is to compile for a model.

    Attributes:
        layers: each once.
        left: index of a layer that epfuse does not run -> why.
    """

    layers: tuple[CallKind, ...]
    left: dict[int, str]


@checks_enums
def model_layers(model: ExpertModel, target: Target, product: str | None, ep_size: int, tp_size: int) -> ModelLayers:
    """The layers of all ranks of a model.

    Args:
        model: whose experts.
        target: the GPUs, none of which need be there.
        product: as torch names it, for the tuned tables; None for the target's `REFERENCE_DEVICE`.
        ep_size: ranks that the experts are spread over.
        tp_size: ranks that I is split over.

    Raises:
        ConfigError: the experts can't be spread, or their width divided, so.
    """
    found: dict[CallKind, None] = {}
    left: dict[int, str] = {}
    held = {len(experts_of_rank(model.experts, ep_size, rank)) for rank in (0, ep_size - 1)}
    for part, index in [(part, index) for part in model.parts for index in model.moe_layers]:
        facts = model_facts(part, index, target=target, max_model_len=1, ep_size=ep_size, tp_size=tp_size)
        for local in sorted(held):
            shape = None if facts.shape is None else replace(facts.shape, local_experts=local)
            choice = choose(replace(facts, shape=shape, device_name=product))
            if choice.plan is None:
                left[index] = choice.reason
            else:
                found.update(dict.fromkeys(layers_of(choice.plan)))
    return ModelLayers(tuple(found), left)


def layers_of(plan: LayerPlan) -> list[CallKind]:
    """A layer's calls on each of its plan's paths; the plan leaves it not untouched."""
    paths = dict.fromkeys(part.decision.path for part in plan.ranges)
    return [plan.request.calls(plan.storage, path) for path in paths]
