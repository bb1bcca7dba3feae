"""The plans of all layers of a model, put together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from epfuse.arguments import checks_enums
from epfuse.config import LayerShape, Path, Policy
from epfuse.hardware.products import Product
from epfuse.policy import Checkpoint, LayerPlan, LayerRequest, PathVerdict, Storage, TokenRange, plan_layer
from epfuse.policy.facts import LayerFacts, model_facts
from epfuse.policy.refusals import layer_refusal
from epfuse.weights.model_config import ExpertModel


@checks_enums
def storages(checkpoint: Checkpoint) -> tuple[Storage, ...]:
    """What a model can be stored as, whoever decides."""
    every = (Storage.BF16, Storage.MXFP8, Storage.HYBRID)
    return (*every, Storage.BLOCK_FP8) if checkpoint is Checkpoint.BLOCK_FP8 else every


@dataclass(frozen=True)
class Serving:
    """How a model is to be served.

    Args:
        product: the GPU, all ranks alike.
        ep_size: P, the ranks that the experts are spread over.
        max_model_len: the longest sequence, tokens.
        hbm_bytes: memory of one GPU.
    """

    product: Product
    ep_size: int
    max_model_len: int
    hbm_bytes: int

    def facts(self, model: ExpertModel, layer: int) -> LayerFacts:
        """What the rules are asked about one layer of ``model`` on its first rank; no rank holds more experts.

        Raises:
            ConfigError: there are more ranks than experts.
        """
        return model_facts(
            model,
            layer,
            target=self.product.target,
            max_model_len=self.max_model_len,
            ep_size=self.ep_size,
        )

    def shape(self, model: ExpertModel) -> LayerShape:
        """The layer of ``model`` on its first rank; no rank holds more experts.

        Raises:
            ConfigError: there are more ranks than experts.
        """
        found = self.facts(model, model.moe_layers[0]).shape
        assert found is not None  # the first rank always holds one
        return found

    @checks_enums
    def bytes_of(self, model: ExpertModel, storage: Storage) -> int:
        """Bytes of the first rank's experts of all layers of ``model``, stored so.

        Raises:
            ConfigError: there are more ranks than experts.
        """
        shapes = [self.shape(part) for part in model.parts]
        layer = sum(storage.bytes_of(shape, type(model.activation), model.bias) for shape in shapes)
        return layer * len(model.moe_layers)

    def ranks(self, model: ExpertModel) -> tuple[tuple[int, int], ...]:
        """How many ranks hold how many experts, the most first.

        Raises:
            ConfigError: there are more ranks than experts.
        """
        most = self.shape(model).local_experts
        fewer = most * self.ep_size - model.experts
        return ((self.ep_size - fewer, most), *(((fewer, most - 1),) if fewer else ()))


@dataclass(frozen=True)
class LayerGroup:
    """Adjacent layers with one plan.

    Attributes:
        layers: their indices in the model, ascending.
        plan: of the first of them; the others' differ in the index alone.
    """

    layers: tuple[int, ...]
    plan: LayerPlan

    @property
    def nbytes(self) -> int | None:
        """Bytes a rank of all of them; None if they are untouched."""
        return None if self.plan.is_untouched else len(self.layers) * self.plan.nbytes


@checks_enums
@dataclass(frozen=True)
class ModelPlan:
    """What `plan_model` found.

    Attributes:
        policy: whose plan it is.
        model: what is served.
        serving: how.
        groups: of all layers with experts.
    """

    policy: Policy
    model: ExpertModel
    serving: Serving
    groups: tuple[LayerGroup, ...]

    @property
    def shape(self) -> LayerShape:
        """One rank's layer."""
        return self.serving.shape(self.model)

    @checks_enums
    def stored_bytes(self, storage: Storage) -> int:
        """Bytes a rank if every layer were stored so."""
        return self.serving.bytes_of(self.model, storage)

    @property
    def chosen_bytes(self) -> int | None:
        """Bytes a rank of what is chosen; None if a layer is untouched."""
        found = 0
        for group in self.groups:
            if group.nbytes is None:
                return None
            found += group.nbytes
        return found

    def kinds(self) -> list[LayerPlan]:
        """The different plans, each once, in the order of the layers."""
        found: dict[object, LayerPlan] = {}
        for group in self.groups:
            found.setdefault(_kind(group.plan), group.plan)
        return list(found.values())

    def ranges(self) -> Iterator[tuple[LayerPlan, TokenRange]]:
        """Every range of every kind of layer."""
        for plan in self.kinds():
            for entry in plan.ranges:
                yield plan, entry

    def refused(self) -> list[tuple[Path, str]]:
        """Every path that some range does not take, with each of its reasons once."""
        found: dict[tuple[Path, str], None] = {}
        for plan in self.kinds():
            if plan.is_untouched:
                found |= {(path, plan.reason): None for path in Path if path is not Path.AUTO}
            for entry in plan.ranges:
                for considered in entry.decision.considered:
                    if considered.verdict is PathVerdict.REFUSED:
                        found[considered.path, considered.reason] = None
        return list(found)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values; bytes are a rank's, null for layers that are untouched."""
        several = len(self.kinds()) > 1
        return {
            "policy": self.policy.value,
            "target": self.serving.product.target.value,
            "shape": asdict(self.shape),
            "ranks": [{"ranks": ranks, "local_experts": experts} for ranks, experts in self.serving.ranks(self.model)],
            "layers": [
                {
                    "from": group.layers[0],
                    "to": group.layers[-1],
                    "storage": group.plan.storage.value,
                    "bytes": group.nbytes,
                }
                for group in self.groups
            ],
            "ranges": [
                {
                    "min_tokens": entry.min_tokens,
                    "max_tokens": entry.max_tokens,
                    "path": entry.decision.path.value,
                    "kernels": entry.decision.family.name if entry.decision.family else None,
                    "tile": entry.decision.tile_key,
                    "reason": _reason(plan, entry, several),
                }
                for plan, entry in self.ranges()
            ],
            "bytes_per_rank": {
                **{storage.value: self.stored_bytes(storage) for storage in storages(self.model.checkpoint)},
                "chosen": self.chosen_bytes,
            },
            "refused": [{"path": path.value, "reason": reason} for path, reason in self.refused()],
        }


def _reason(plan: LayerPlan, entry: TokenRange, several: bool) -> str:
    reason = entry.decision.reason
    return f"Layers that keep {plan.storage.value}: {reason}" if several else reason


def _kind(plan: LayerPlan) -> tuple[object, ...]:
    """What makes two layers' plans the same."""
    return plan.storage, plan.reason, tuple((r.min_tokens, r.max_tokens, r.decision) for r in plan.ranges)


@checks_enums
def plan_model(model: ExpertModel, serving: Serving, policy: Policy) -> ModelPlan:
    """Plan every layer of a model that has experts.

    Args:
        model: its experts.
        serving: how it is served.
        policy: who decides.

    Raises:
        ConfigError: there are more ranks than experts, or the experts don't fit.
    """
    plans = [_plan(model, serving, policy, layer) for layer in model.moe_layers]
    groups = []
    for _, alike in groupby(plans, key=_kind):
        members = list(alike)
        groups.append(LayerGroup(tuple(plan.request.layer for plan in members), members[0]))
    return ModelPlan(policy, model, serving, tuple(groups))


def _plan(model: ExpertModel, serving: Serving, policy: Policy, layer: int) -> LayerPlan:
    """By the rules of what the layer can do, which every integration asks too, then by the policy."""
    facts = serving.facts(model, layer)
    assert facts.shape is not None  # the first rank always holds an expert
    activation = model.activation_at(layer)
    request = LayerRequest(
        target=serving.product.target,
        shape=facts.shape,
        ep_size=serving.ep_size,
        max_model_len=serving.max_model_len,
        layer=layer,
        moe_layers=model.moe_layers,
        activation=model.activation if activation is None else activation,
        bias=model.bias,
        checkpoint=model.checkpoint,
        shared_experts=model.shared_experts,
        hbm_bytes=serving.hbm_bytes,
        device_name=serving.product.device_name,
        beside=tuple(serving.shape(part) for part in model.parts[1:]),
    )
    refusals = (layer_refusal(serving.facts(part, layer)) for part in model.parts)
    reason = next(filter(None, refusals), None)
    if reason is not None:
        return LayerPlan(policy, request, Storage.UNTOUCHED, reason[0].upper() + reason[1:])
    return plan_layer(request, policy)
