"""What explain says of every known family, beside what the plugin does with the layers that vLLM's own code builds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from epfuse.config import SwiGLUOAI
from epfuse.integrations.choice import Choice
from epfuse.integrations.vllm import explain, layer, releases
from epfuse.policy import Checkpoint
from epfuse.target import Target
from epfuse.weights.config_families import FAMILIES
from epfuse.weights.model_config import ExpertModel
from tests.integrations.vllm.deployments import Deployment, build
from tests.weights.test_config_families import MODELS
from tests.weights.test_config_families import build as build_in_transformers

RANKS = 8


def deployment_of(model: ExpertModel, index: int, target: Target, spread: bool) -> Deployment:
    """The layer as vLLM's model code asks for it."""
    activation = model.activation_at(index)
    activation = activation if isinstance(activation, SwiGLUOAI) else None  # of the others the plugin takes none
    name = "swiglustep" if activation is None else "silu" if activation.beta == 0 else "swigluoai_uninterleave"
    limit = None if activation is None or activation.limit == float("inf") else activation.limit
    gain = (None, None) if name.startswith("si") or activation is None else (activation.alpha, activation.beta)
    if model.name == "gpt_oss":
        name, limit, gain = "swigluoai", None, (None, None)
    return Deployment(
        target=target,
        quantization="modelopt" if model.checkpoint is Checkpoint.MXFP8 else None,
        hidden=model.hidden,
        intermediate=model.intermediate if spread else model.intermediate // RANKS,
        experts=model.experts,
        top_k=model.top_k,
        ep_size=RANKS if spread else 1,
        activation=name,
        alpha=gain[0],
        beta=gain[1],
        limit=limit,
        shared_experts=model.shared_experts,
        bias=model.has_bias,
        weights_input=model.weights_input,
        dtype=getattr(torch, model.dtype),
        weights_dtype=getattr(torch, model.dtype),
    )


def explained(model: ExpertModel, target: Target, spread: bool) -> Iterator[tuple[int, explain.OwnExperts, Choice]]:
    serving = explain.Deployment(target, releases.installed(), RANKS, spread, 9472)
    for group in explain.explain(model, serving):
        yield group.layers[0], group.own, group.choice


@pytest.mark.parametrize("checkpoint", [Checkpoint.BF16, Checkpoint.MXFP8])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_explain_promises_what_the_plugin_does(name, checkpoint, tmp_path, monkeypatch):
    chosen: list[Choice] = []
    offer = layer.offer
    monkeypatch.setattr(layer, "offer", lambda *args: chosen.append(offer(*args)))
    monkeypatch.setenv("EPFUSE_STRICT", "1")
    model = replace(build_in_transformers(MODELS[name], tmp_path)[2], checkpoint=checkpoint)
    for target in (Target.GFX942, Target.GFX950, Target.SM90):
        for spread in (True, False):
            width = model.intermediate if spread else model.intermediate // RANKS
            if model.experts < RANKS or model.intermediate % RANKS or (checkpoint is Checkpoint.MXFP8 and width % 32):
                continue  # vLLM serves none of these
            for index, own, choice in explained(model, target, spread):
                deployment = deployment_of(model, index, target, spread)
                vllms = build(deployment, monkeypatch, RoutedExperts).quant_method.experts_cls.__name__
                build(deployment, monkeypatch)
                found = chosen.pop()
                assert (choice.is_ours, choice.plan and choice.plan.storage) == (
                    found.is_ours,
                    found.plan and found.plan.storage,
                ), (target, spread, index, choice.reason, found.reason)
                if "Humming" not in own.name:  # which is not installed here
                    assert own.name == vllms


def test_gpt_oss_is_promised_in_bf16_alone(tmp_path):
    model = build_in_transformers(MODELS["gpt_oss"], tmp_path)[2]
    for checkpoint in (Checkpoint.BF16, Checkpoint.MXFP4):
        for _, _, choice in explained(replace(model, checkpoint=checkpoint), Target.GFX942, True):
            assert choice.is_ours == (checkpoint is Checkpoint.BF16)
            assert choice.is_ours or choice.reason.startswith("GptOssMxfp4MoEMethod is left alone: epfuse would")
    assert set(MODELS) <= set(FAMILIES)
