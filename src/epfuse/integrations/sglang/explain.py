"""What an SGLang deployment does with every MoE layer, without epfuse and with it; needs no SGLang and no GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from epfuse.arguments import checks_enums
from epfuse.config import Policy
from epfuse.errors import ConfigError
from epfuse.integrations.explained import ChoiceGroup, OwnExperts, grouped
from epfuse.integrations.sglang.rules import (
    AUTO,
    Offer,
    Runner,
    decide,
    makes_linears_bf16,
    rival_of,
    why_it_stops,
)
from epfuse.policy import Checkpoint, LayerFacts, model_facts
from epfuse.target import Target
from epfuse.weights.model_config import ExpertModel

OURS = "EpfuseRunnerCore"
"""epfuse's class in SGLang."""
METHODS = {
    (Checkpoint.BF16, None): "UnquantizedFusedMoEMethod",
    (Checkpoint.MXFP8, "mxfp8"): "Fp8MoEMethod",
}
"""Numbers of the experts, ``quant_method`` of the checkpoint -> SGLang's method, where epfuse may take its place."""
FUSES_SHARED = {
    "minimax-m3": (Target.SM90, Target.GFX950),
    "minimax_m3": (Target.SM90, Target.GFX950),
    "minimax_m3_text": (Target.SM90, Target.GFX950),
    "minimax_m3_vl_text": (Target.SM90, Target.GFX950),
}
"""Models whose shared expert SGLang appends to the routed ones on these GPUs, where no expert parallelism is."""
_NONE = OwnExperts("none", "SGLang starts no MXFP8 checkpoint below compute capability 10.0.")
_CONVERTED = OwnExperts("Fp8MoEMethod", "MXFP8 weights become 128x128 block FP8 at load, which changes them.")
_NATIVE = OwnExperts("Fp8MoEMethod", "MXFP8 weights and activations, multiplied by the matrix cores.")
_TRITON = OwnExperts("TritonRunnerCore", "BF16 weights, in two GEMMs with the activation between them.")
_OWN = {
    (Checkpoint.MXFP8, Target.SM90): _NONE,
    (Checkpoint.MXFP8, Target.GFX942): _CONVERTED,
    (Checkpoint.MXFP8, Target.GFX950): _NATIVE,
}


@checks_enums
@dataclass(frozen=True)
class SGLangDeployment:
    """The part of a ``python -m sglang.launch_server`` line that decides about experts.

    Attributes:
        target: the GPUs.
        tp_size: ``--tp-size``: all ranks.
        ep_size: ``--ep-size``: ranks that the experts are spread over; I is split over ``tp_size / ep_size``.
        runner: ``--moe-runner-backend``.
        gemm: ``--fp8-gemm-backend``.
        all2all: ``--moe-a2a-backend``.
        device_name: the product, as torch names it, for the tuned tables; None for the target's `REFERENCE_DEVICE`.
    """

    target: Target
    tp_size: int
    ep_size: int
    runner: str = AUTO
    gemm: str = AUTO
    all2all: str = "none"
    device_name: str | None = None


@dataclass(frozen=True)
class Explained:
    """A model in a deployment.

    Attributes:
        groups: its MoE layers.
        linears: what happens to its other linear layers, a sentence; None where epfuse leaves them alone.
        stops: why the server does not start; None if nothing that is asked here speaks against it.
    """

    groups: list[ChoiceGroup]
    linears: str | None
    stops: str | None

    @property
    def expert_bytes(self) -> int:
        """Of all layers that epfuse runs, on one rank."""
        return sum(len(group.layers) * group.choice.plan.nbytes for group in self.groups if group.choice.plan)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "groups": [group.to_json() for group in self.groups],
            "linear_layers": self.linears,
            "expert_bytes_per_rank": self.expert_bytes,
            "stops": self.stops,
        }


@checks_enums
def explain(
    model: ExpertModel, quant_method: str | None, deployment: SGLangDeployment, policy: Policy | None = None
) -> Explained:
    """Every MoE layer of the model, grouped by what happens to it.

    Args:
        model: whose experts.
        quant_method: of its checkpoint, as config.json names it; None for none.
        deployment: how it is served.
        policy: None means the environment's, else AUTO.

    Raises:
        ConfigError: the experts can't be spread, or their width divided, so.
    """
    offers = [[offer(part, quant_method, deployment, layer) for layer in part.moe_layers] for part in model.parts]
    choices = [[decide(each, policy) for each in found] for found in offers]
    own = _own_experts(offers[0][0], quant_method)
    stops = filter(None, map(why_it_stops, chain(*offers), chain(*choices)))
    groups = (
        grouped(zip(part.moe_layers, found, strict=True), own, OURS, part.intermediate)
        for part, found in zip(model.parts, choices, strict=True)
    )
    is_bf16 = makes_linears_bf16(quant_method == "mxfp8", deployment.target, deployment.gemm)
    return Explained(
        list(chain(*groups)),
        "MXFP8 weights become BF16 at load: twice the bytes, and exact." if is_bf16 else None,
        next(stops, None),
    )


def offer(model: ExpertModel, quant_method: str | None, deployment: SGLangDeployment, layer: int) -> Offer:
    """What SGLang would build on one rank; all hold the same.

    Raises:
        ConfigError: the experts can't be spread, or their width divided, so.
    """
    ranks, spread = deployment.tp_size, deployment.ep_size
    if spread < 1 or ranks % spread:
        raise ConfigError(f"ep_size is {spread}; it must divide tp_size, {ranks}")
    if model.experts % spread:
        raise ConfigError(f"ep_size is {spread}; SGLang needs one that divides the {model.experts} experts")
    found = model_facts(
        model, layer, target=deployment.target, max_model_len=1, ep_size=spread, tp_size=ranks // spread
    )
    runner = Runner(deployment.runner, is_named=deployment.runner != AUTO)
    method = METHODS.get((model.checkpoint, None if model.checkpoint is Checkpoint.BF16 else quant_method))
    checkpoint = None if method is None else model.checkpoint
    facts = replace(
        found,
        method=method or f"the method of quant_method {quant_method!r:.40}",
        checkpoint=checkpoint,
        own_experts=rival_of(checkpoint, deployment.target, runner),
        shared_experts=0,  # one that is not fused is no concern of SGLang's layer
        all2all=None if deployment.all2all == "none" else deployment.all2all,
        device_name=deployment.device_name,
    )
    return Offer(_with_shared(facts, model, deployment), runner)


def _with_shared(facts: LayerFacts, model: ExpertModel, deployment: SGLangDeployment) -> LayerFacts:
    """With the shared expert among the routed ones, where SGLang puts it there."""
    fuses = deployment.target in FUSES_SHARED.get(model.name, ()) and deployment.ep_size == 1
    if not (fuses and model.shared_experts) or facts.shape is None:
        return facts
    shape, more = facts.shape, model.shared_experts
    sizes = {name: getattr(shape, name) + more for name in ("experts", "local_experts", "top_k")}
    return replace(facts, shape=replace(shape, **sizes), shared_experts=more)


def _own_experts(offered: Offer, quant_method: str | None) -> OwnExperts:
    """What SGLang runs by itself, or what the user tells it to."""
    facts, runner = offered.facts, offered.runner
    if runner.is_named and not runner.is_ours:
        asked = f"--moe-runner-backend {runner.name}"
        return OwnExperts(f"those of {asked}", "Which kernels multiply, or that none can, is not known here.")
    if facts.checkpoint is None:
        return OwnExperts(f"SGLang's choice for {quant_method}", "Which kernels multiply is not known here.")
    assert facts.target is not None
    return _OWN.get((facts.checkpoint, facts.target), _TRITON)
