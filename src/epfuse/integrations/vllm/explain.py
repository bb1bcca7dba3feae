"""What a vLLM deployment does with every MoE layer, without epfuse and with it; needs no vLLM and no GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from epfuse.arguments import checks_enums
from epfuse.config import Policy
from epfuse.errors import ConfigError
from epfuse.integrations.choice import choose
from epfuse.integrations.explained import ChoiceGroup, OwnExperts, grouped
from epfuse.integrations.vllm.releases import release_of
from epfuse.integrations.vllm.versions import GPT_OSS, INTERLEAVED, why_left
from epfuse.policy import Checkpoint, LayerFacts, model_facts
from epfuse.policy.facts import GATHERED
from epfuse.target import Target
from epfuse.weights.model_config import ExpertModel

_EMULATION = OwnExperts("Mxfp8EmulationTritonExperts", "MXFP8 weights become BF16 at load: twice the memory.")
_NATIVE = OwnExperts("Mxfp8NativeTritonExperts", "MXFP8 weights and activations, multiplied by the matrix cores.")
_MARLIN = OwnExperts("MarlinExperts", "MXFP8 weights, dequantised in registers.")
_HUMMING_GROUPED = OwnExperts("HummingGroupedExperts", "MXFP8 weights, dequantised in registers, routes grouped first.")
_HUMMING_INDEXED = OwnExperts("HummingIndexedExperts", "MXFP8 weights, dequantised in registers.")
_TRITON = OwnExperts("TritonExperts", "BF16 weights, in two GEMMs with the activation between them.")
_CHOICES = {
    (Target.GFX942, Checkpoint.MXFP8): _EMULATION,
    (Target.GFX950, Checkpoint.MXFP8): _NATIVE,
    (Target.SM90, Checkpoint.MXFP8): _MARLIN,
    (Target.GFX942, Checkpoint.BF16): _TRITON,
    (Target.GFX950, Checkpoint.BF16): _TRITON,
    (Target.SM90, Checkpoint.BF16): _TRITON,
}
OWN_EXPERTS = {"0.25.1": _CHOICES, "0.32.0": _CHOICES, "0.33.0": _CHOICES}
"""vLLM release -> its choice for MiniMax-M3 without AITER and humming; tested against vLLM's own code."""
_HUMMING = {True: _HUMMING_GROUPED, False: _HUMMING_INDEXED}
WITH_HUMMING = {"0.32.0": _HUMMING, "0.33.0": _HUMMING}
"""Releases that require humming and prefer it to Marlin -> whether experts are spread over ranks -> their choice."""

_FP8 = OwnExperts("vLLM's choice for Fp8MoEMethod", "Block FP8 weights; which class multiplies them is not known here.")
_FP4 = OwnExperts("vLLM's choice for MXFP4", "MXFP4 weights; which class multiplies them is not known here.")
_LEFT = {Checkpoint.BLOCK_FP8: _FP8, Checkpoint.MXFP4: _FP4}
"""Weights that epfuse replaces nobody for in vLLM -> what is known of its choice."""
METHODS = {
    Checkpoint.BF16: "UnquantizedFusedMoEMethod",
    Checkpoint.MXFP8: "ModelOptMxFp8FusedMoE",
    Checkpoint.BLOCK_FP8: "Fp8MoEMethod",
    Checkpoint.MXFP4: "GptOssMxfp4MoEMethod",
}
"""Numbers of the weights -> vLLM's quantisation method."""
ALTERNATING = frozenset({"gpt_oss"})
"""Models whose gate and up rows alternate in vLLM's w13."""


def own_experts(model: ExpertModel, deployment: Deployment) -> OwnExperts:
    """What vLLM chooses by itself, installed as its wheel asks for, or what the user tells it to.

    Raises:
        ConfigError: nothing is known of this release, GPU and checkpoint.
    """
    release = release_of(deployment.release)
    known = OWN_EXPERTS.get(release, {})
    if known and deployment.backend != "auto":
        asked = f"--moe-backend {deployment.backend}"
        return OwnExperts(f"those of {asked}", "Which class multiplies, or that none can, is not known here.")
    own = known.get((deployment.target, model.checkpoint), _LEFT.get(model.checkpoint) if known else None)
    if own is None:
        raise ConfigError(
            f"what vLLM {deployment.release} chooses for {model.checkpoint.value} experts on {deployment.target.value}"
            f" is not known; known are {', '.join(OWN_EXPERTS)} with mxfp8 and bf16 on gfx942, gfx950 and sm_90"
        )
    humming = WITH_HUMMING.get(release)
    return humming[deployment.expert_parallel] if own is _MARLIN and humming is not None else own


@checks_enums
@dataclass(frozen=True)
class Deployment:
    """The part of a ``vllm serve`` line that decides about experts.

    Attributes:
        target: the GPUs.
        release: vLLM's version; of a later build of a release (``.post1``, ``+rocm711``) what the release does.
        tp_size: ``--tensor-parallel-size``.
        expert_parallel: ``--enable-expert-parallel``.
        max_model_len: ``--max-model-len``.
        backend: ``--moe-backend``.
        device_name: the product, as torch names it, for the tuned tables; None for the target's `REFERENCE_DEVICE`.
        dp_size: ``--data-parallel-size``; each of them has ``tp_size`` ranks, and all of these share the experts.
        all2all: ``--all2all-backend``, by which data parallel ranks exchange tokens where experts are whole.
    """

    target: Target
    release: str
    tp_size: int
    expert_parallel: bool
    max_model_len: int
    backend: str = "auto"
    device_name: str | None = None
    dp_size: int = 1
    all2all: str = GATHERED


@checks_enums
def explain(model: ExpertModel, deployment: Deployment, policy: Policy | None = None) -> list[ChoiceGroup]:
    """Every MoE layer of the model, grouped by what happens to it.

    Args:
        model: whose experts.
        deployment: how it is served.
        policy: None means the environment's, else AUTO.

    Raises:
        ConfigError: the experts can't be spread so, or nothing is known of this release, GPU and checkpoint.
    """
    own = own_experts(model, deployment)
    groups: list[ChoiceGroup] = []
    for part in model.parts:
        choices = ((layer, choose(facts(part, deployment, own, layer), policy)) for layer in part.moe_layers)
        groups += grouped(choices, own, "EpfuseExperts", part.intermediate)
    return groups


def facts(model: ExpertModel, deployment: Deployment, own: OwnExperts, layer: int) -> LayerFacts:
    """What vLLM would build on its first rank.

    Raises:
        ConfigError: the experts can't be spread, or their width divided, over that many ranks.
    """
    ranks, spread = deployment.tp_size * deployment.dp_size, deployment.expert_parallel
    found = model_facts(
        model,
        layer,
        target=deployment.target,
        max_model_len=deployment.max_model_len,
        ep_size=ranks if spread else 1,
        tp_size=1 if spread else ranks,
    )
    if model.name in ALTERNATING:
        found = replace(found, activation=GPT_OSS, activation_name=INTERLEAVED, has_alternating_rows=True)
    return replace(
        found,
        method=METHODS[model.checkpoint],
        own_experts=own.name,
        checkpoint=None if model.checkpoint in _LEFT else model.checkpoint,
        why_left=why_left(METHODS[model.checkpoint], model.has_bias),
        asked_backend=deployment.backend,
        device_name=deployment.device_name,
        all2all=deployment.all2all if spread and deployment.dp_size > 1 else None,
    )
