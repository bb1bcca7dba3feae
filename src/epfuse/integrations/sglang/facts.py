"""What SGLang is about to build for one MoE layer, in the words that every decision is made from."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.moe.utils import get_moe_a2a_backend, get_moe_runner_backend

from epfuse.config import LayerShape, SwiGLUOAI
from epfuse.errors import ConfigError, UnsupportedTarget
from epfuse.integrations.sglang.settings import setting
from epfuse.policy import LayerFacts
from epfuse.target import Target, target_of
from epfuse.weights.checkpoint_format import Checkpoint

NAME = "epfuse"
"""Of the MoE runner: ``--moe-runner-backend epfuse``."""

CONVERTED = "block FP8 made of MXFP8"
"""What runs an MXFP8 layer on gfx942 if epfuse does not; a name of the policy's table of rivals."""


def target_here() -> Target | None:
    """The GPU that the model is being built on; None for one that epfuse has no kernels for."""
    try:
        return target_of(torch.empty(0).device)  # SGLang builds models under `with target_device:`
    except UnsupportedTarget:
        return None


def is_asked_for() -> bool:
    """Whether the user named epfuse's runner, so that a layer that it can't run is an error."""
    return bool(get_moe_runner_backend().value == NAME)


@dataclass(frozen=True)
class Offer:
    """One layer as SGLang builds it.

    Attributes:
        facts: for the policy.
        refused: why epfuse can't run the layer, by what only SGLang has; None if nothing of that speaks against it.
    """

    facts: LayerFacts
    refused: str | None


def offer_of(layer: Any, method: Any) -> Offer:
    """Read a FusedMoE before its weights are made.

    Args:
        layer: SGLang's FusedMoE.
        method: the quantisation method that it chose.
    """
    config = layer.moe_runner_config
    checkpoint, target = _checkpoint(method), target_here()
    activation = _activation(config)
    index = re.search(r"\.layers\.(\d+)\.", f".{layer.layer_name}.")
    shape = LayerShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size_per_partition,
        experts=config.num_experts,
        local_experts=config.num_local_experts,
        top_k=config.top_k or 1,
    )
    facts = LayerFacts(
        name=layer.layer_name,
        layer=int(index.group(1)) if index else 0,
        method=type(method).__name__,
        own_experts=None if is_asked_for() else _rival(checkpoint, target),
        checkpoint=checkpoint,
        target=target,
        shape=shape,
        tp_size=layer.moe_tp_size,
        ep_size=layer.moe_ep_size,
        max_model_len=int(setting("context_length") or 1),
        shared_experts=int(config.num_fused_shared_experts or 0),
        activation=activation,
        activation_name=_activation_words(config),
        dtype=str(layer.params_dtype),
        weights_dtype=str(layer.params_dtype),
        has_lora=bool(setting("enable_lora") or setting("lora_paths")),
        has_eplb=bool(setting("enable_eplb")),
        has_bias=layer.with_bias,
        weights_input=config.apply_router_weight_on_input,
        all2all=None if get_moe_a2a_backend().is_none() else get_moe_a2a_backend().value,
    )
    return Offer(facts, _refused(layer, method, config))


def _checkpoint(method: Any) -> Checkpoint | None:
    if type(method).__name__ == "UnquantizedFusedMoEMethod":
        return Checkpoint.BF16
    quant = method.quant_config
    if quant.use_mxfp8 and quant.is_checkpoint_fp8_serialized and not quant.is_fp4_experts:
        return Checkpoint.MXFP8
    return None


def _rival(checkpoint: Checkpoint | None, target: Target | None) -> str | None:
    """What of SGLang's would run the layer; None where nothing would."""
    if checkpoint is Checkpoint.MXFP8:
        return None if target in (Target.SM90, Target.CPU) else CONVERTED
    return "SGLang's TritonRunnerCore"


def _activation(config: Any) -> SwiGLUOAI | None:
    """As SGLang's Triton runner reads the fields, which is the reference for what they mean."""
    if config.activation != "silu" or not config.is_gated:
        return None
    alpha, beta, limit = config.gemm1_alpha, config.gemm1_beta, config.gemm1_clamp_limit
    if alpha is not None:
        if limit is None or config.gate_up_interleaved or config.swiglu_limit is not None:
            return None
        beta = 1.0 if beta is None else beta
    elif beta not in (None, 0.0):
        return None
    else:
        if limit is not None and config.swiglu_limit not in (None, limit):
            return None
        alpha, beta = 1.0, 0.0
        limit = config.swiglu_limit if limit is None else limit
    try:
        return SwiGLUOAI(float(alpha), float(beta), math.inf if limit is None else float(limit))
    except ConfigError:  # SGLang checks none of them
        return None


def _activation_words(config: Any) -> str:
    fields = ("is_gated", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "swiglu_limit", "gate_up_interleaved")
    said = [f"{field}={getattr(config, field)}" for field in fields if getattr(config, field) is not None]
    return f"{config.activation} with {', '.join(said)}"


def _refused(layer: Any, method: Any, config: Any) -> str | None:
    """Every field of MoeRunnerConfig that asks for what we don't do, and every way to run that we don't know."""
    asked = get_moe_runner_backend().value
    switches = (
        "enable_two_batch_overlap",
        "enable_single_batch_overlap",
        "enable_deterministic_inference",
        "enable_elastic_expert_backup",
    )
    reasons = (
        (
            asked not in ("auto", NAME),
            f"--moe-runner-backend is {asked} (given, or SGLang's choice for this quantisation); ask for {NAME}.",
        ),
        (layer.quant_method is not method, f"{type(layer.quant_method).__name__} wraps the layer's method."),
        (config.no_combine, "MoeRunnerConfig.no_combine asks for the rows of each expert; epfuse sums them."),
        (
            getattr(config, "no_combine_keep_router_weight", False),
            "MoeRunnerConfig.no_combine_keep_router_weight asks for the rows of each expert; epfuse sums them.",
        ),
        (
            config.use_tp_all_gather_activation,
            "MoeRunnerConfig.use_tp_all_gather_activation splits the activation over ranks.",
        ),
        (
            getattr(config, "silu_mul_keep_fp32", False),
            "MoeRunnerConfig.silu_mul_keep_fp32 is SGLang's for DeepGEMM only.",
        ),
        (not config.top_k, "MoeRunnerConfig.top_k is not given."),
        (layer.with_bias, "the experts have biases, which epfuse does not add in SGLang."),
        *(
            (bool(setting(name)), f"--{name.replace('_', '-')} is on, which epfuse does not serve.")
            for name in switches
        ),
    )
    return next((reason for applies, reason in reasons if applies), None)
