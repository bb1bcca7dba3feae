"""What explain says, beside what the plugin does with the layers that SGLang's own code builds."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from epfuse.config import SwiGLUOAI
from epfuse.errors import ConfigError
from epfuse.integrations.choice import Choice
from epfuse.integrations.sglang import explain, hooks
from epfuse.integrations.sglang.rules import NAME
from epfuse.policy import Checkpoint
from epfuse.target import Target
from epfuse.weights.model_config import MINIMAX_M3, ExpertModel
from tests.integrations.sglang.deployment import SWIGLU_OAI, Deployment, installed
from tests.weights.test_config_families import MODELS
from tests.weights.test_config_families import build as build_in_transformers

GPUS = (Target.SM90, Target.GFX942, Target.GFX950)
METHOD = {Checkpoint.BF16: None, Checkpoint.MXFP8: "mxfp8"}


def layer_of(model: ExpertModel, index: int) -> dict:
    """FusedMoE's arguments as SGLang's models give them."""
    activation = model.activation_at(index)
    if not isinstance(activation, SwiGLUOAI):
        found = {"activation": "gelu"}
    elif activation.beta == 0:
        found = {} if activation.limit == math.inf else {"swiglu_limit": activation.limit}
    else:
        found = {**SWIGLU_OAI, "gemm1_alpha": activation.alpha, "gemm1_clamp_limit": activation.limit}
    return {**found, "with_bias": model.has_bias, "apply_router_weight_on_input": model.weights_input}


def plugins_choice(model, asked: explain.SGLangDeployment, index, monkeypatch) -> Choice | str:
    """What the plugin does with the layer that SGLang builds; of one that stops the server, what it says."""
    chosen: list[Choice] = []
    monkeypatch.setattr(hooks, "decide", lambda given, decide=hooks.decide: chosen.append(decide(given)) or chosen[-1])
    shape = explain.offer(model, METHOD[model.checkpoint], asked, index).facts.shape
    shared = shape.experts - model.experts
    deployment = Deployment(
        target=asked.target,
        quantized=model.checkpoint is Checkpoint.MXFP8,
        ep=asked.ep_size,
        tp=asked.tp_size // asked.ep_size,
        server={"moe_runner_backend": asked.runner},
        layer={**layer_of(model, index), "num_fused_shared_experts": shared},
        sizes=(shape.experts, model.hidden, model.intermediate, shape.top_k),
    )
    try:
        with deployment.entered(monkeypatch), torch.device("meta"):
            deployment.build()
    except ConfigError as error:
        return str(error).replace("model.layers.3.mlp.experts", f"model.layers.{index}")
    return chosen[-1]


def in_general(reason: str | None) -> str | None:
    """Without an activation's name, which SGLang and transformers have each for themselves."""
    return None if reason is None else re.sub("the activation is '[^']*'", "the activation", reason)


def check_that_both_agree(model, asked, monkeypatch) -> None:
    """On every group of layers."""
    said = explain.explain(model, METHOD[model.checkpoint], asked)
    for group in said.groups:
        found = plugins_choice(model, asked, group.layers[0], monkeypatch)
        if isinstance(found, str):
            assert in_general(found) == in_general(said.stops)
            continue
        assert said.stops is None
        assert (found.is_ours, in_general(found.reason)) == (group.choice.is_ours, in_general(group.choice.reason))
        if found.plan is not None:
            assert found.plan.storage is group.choice.plan.storage
            assert found.plan.request.shape == group.choice.plan.request.shape
            assert found.plan.nbytes == group.choice.plan.nbytes


@pytest.mark.parametrize("runner", ["auto", NAME, "triton"])
@pytest.mark.parametrize("checkpoint", METHOD)
@pytest.mark.parametrize("target", GPUS)
def test_explain_of_minimax_m3_promises_what_the_plugin_does(target, checkpoint, runner, monkeypatch):
    model = replace(MINIMAX_M3, checkpoint=checkpoint)
    with installed():
        for tp, ep in ((1, 1), (4, 4), (8, 2), (8, 1)):
            check_that_both_agree(model, explain.SGLangDeployment(target, tp, ep, runner), monkeypatch)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "deepseek_v4", "gpt_oss", "gemma4_text", "llama4_text"])
def test_explain_of_other_families_does_too(name, tmp_path, monkeypatch):
    model = build_in_transformers(MODELS[name], tmp_path)[2]
    with installed():
        for checkpoint in METHOD:
            for target in GPUS:
                for runner in ("auto", NAME):
                    asked = explain.SGLangDeployment(target, 8, 8, runner)
                    check_that_both_agree(replace(model, checkpoint=checkpoint), asked, monkeypatch)


def test_the_linears_are_the_plugins(monkeypatch):
    from sglang.srt.layers.linear import ReplicatedLinear
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    from epfuse.integrations.sglang.dense import DenseMxfp8Method
    from tests.integrations.sglang.deployment import MXFP8_CONFIG

    for target in (Target.SM90, Target.GFX942):
        for gemm in ("auto", "triton"):
            deployment = Deployment(target=target, server={"fp8_gemm_runner_backend": gemm})
            with installed(), deployment.entered(monkeypatch):
                config = Fp8Config.from_config(MXFP8_CONFIG)
                linear = ReplicatedLinear(64, 64, bias=False, quant_config=config, prefix="q")
            said = explain.explain(MINIMAX_M3, "mxfp8", explain.SGLangDeployment(target, 4, 4, gemm=gemm))
            assert isinstance(linear.quant_method, DenseMxfp8Method) == (said.linears is not None)


def test_where_the_shared_expert_is_fused_sglangs_own_model_says(monkeypatch):
    """Its class decides by the platform, which is faked."""
    minimax_m3 = pytest.importorskip("sglang.srt.models.minimax_m3", reason="needs kernels to be imported")
    reason = minimax_m3.MiniMaxM3SparseForCausalLM.shared_experts_fusion_disable_reason
    for target in GPUS:
        platform = {
            "_is_cuda": target is Target.SM90,
            "_device_sm": 90,
            "_is_hip": target is not Target.SM90,
            "_is_gfx95_supported": target is Target.GFX950,
        }
        for name, value in platform.items():
            monkeypatch.setattr(minimax_m3, name, value)
        for tp, ep in ((4, 1), (4, 4)):
            with Deployment(target=target, ep=ep, tp=tp // ep).entered(monkeypatch):
                fused = reason(SimpleNamespace(n_shared_experts=1), None) is None
            said = explain.offer(MINIMAX_M3, "mxfp8", explain.SGLangDeployment(target, tp, ep), 3).facts
            assert (said.shared_experts == 1) == fused
