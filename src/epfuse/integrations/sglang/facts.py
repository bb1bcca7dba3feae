"""What SGLang is about to build for one MoE layer, in the words that every decision is made from."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from sglang.srt.layers.moe.utils import get_moe_a2a_backend, get_moe_runner_backend

from epfuse.config import LayerShape, SwiGLUOAI
from epfuse.errors import ConfigError, UnsupportedTarget
from epfuse.integrations.sglang.rules import FIELDS, SWITCHES, Offer, Runner, rival_of
from epfuse.integrations.sglang.settings import most_tokens, setting, written
from epfuse.policy import LayerFacts
from epfuse.target import Target, device_name, target_of
from epfuse.weights.checkpoint_format import Checkpoint


def target_here() -> Target | None:
    """The GPU that the model is being built on; None for one that epfuse has no kernels for."""
    try:
        return target_of(torch.empty(0).device)  # SGLang builds models under `with target_device:`
    except UnsupportedTarget:
        return None


def product_here() -> str | None:
    """The GPU that the model is being built on, as tables know it; None where there is none to ask."""
    device = torch.empty(0).device
    return device_name(device) if device.type == "cuda" else None


def runner_here() -> Runner:
    """What is to run the layers that are built now; a draft model may have another runner than its target."""
    name = get_moe_runner_backend().value
    is_sglangs = written("moe_runner_backend") == "auto" and name == setting("moe_runner_backend")
    return Runner(name, is_named=not is_sglangs)


def offer_of(layer: Any, method: Any) -> Offer:
    """Read a FusedMoE before its weights are made.

    Args:
        layer: SGLang's FusedMoE.
        method: the quantisation method that it chose.
    """
    config = layer.moe_runner_config
    checkpoint, target, runner = _checkpoint(method), target_here(), runner_here()
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
        own_experts=rival_of(checkpoint, target, runner),
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
        device_name=product_here(),
        max_tokens=most_tokens(),
    )
    return Offer(
        facts,
        runner,
        fields=tuple(name for name in FIELDS if getattr(config, name, False)),
        switches=tuple(name for name in SWITCHES if setting(name)),
        has_top_k=bool(config.top_k),
        wrapper=None if layer.quant_method is method else type(layer.quant_method).__name__,
        prefetch_ranks=int(setting("dwdp_size") or 1),
    )


def _checkpoint(method: Any) -> Checkpoint | None:
    if type(method).__name__ == "UnquantizedFusedMoEMethod":
        return Checkpoint.BF16
    quant = method.quant_config
    if quant.use_mxfp8 and quant.is_checkpoint_fp8_serialized and not quant.is_fp4_experts:
        return Checkpoint.MXFP8
    return None


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
