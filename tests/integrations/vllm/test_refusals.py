"""Every configuration that is left to vLLM, built by vLLM's own code, with the reason that is logged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.fused_moe import all2all_utils
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from epfuse.config import Policy
from epfuse.environment import environment
from epfuse.integrations.vllm import layer, versions
from epfuse.policy.facts import LayerFacts
from epfuse.policy.refusals import REFUSALS, refusal
from epfuse.target import Target
from tests.integrations.vllm.deployments import M3_EP8, Deployment, build

BF16 = {"quantization": None}
NO_PARAMETERS = {"alpha": None, "beta": None, "limit": None}
# changes of a deployment that is taken -> words of the reason
CASES: dict[str, tuple[dict[str, object], str]] = {
    "explicit backend": (BF16 | {"backend": "triton"}, "--moe-backend triton was asked for"),
    "explicit backend for MXFP8": ({"backend": "marlin", "target": Target.SM90}, "--moe-backend marlin was asked for"),
    "activations in FP16": (BF16 | {"dtype": torch.float16}, "activations are torch.float16"),
    "weights in FP32": (BF16 | {"weights_dtype": torch.float32}, "weights are torch.float32 and activations"),
    "a gain for gpt-oss": (
        BF16 | {"activation": "swigluoai", "alpha": 1.5},
        "the activation is 'swigluoai with alpha 1.5, beta 1, limit 7'",
    ),
    "GELU": (BF16 | NO_PARAMETERS | {"activation": "gelu"}, "the activation is 'gelu'"),
    "a gain for silu": (BF16 | {"activation": "silu"}, "the activation is 'silu with alpha 1.702, beta 1, limit 7'"),
    "no gain for SwiGLU-OAI": (BF16 | {"alpha": None}, "'swigluoai_uninterleave with beta 1, limit 7'"),
    "no limit for SwiGLU-OAI": (BF16 | {"limit": None}, "'swigluoai_uninterleave with alpha 1.702, beta 1'"),
    "a limit of 0": (BF16 | {"limit": 0.0}, "'swigluoai_uninterleave with alpha 1.702, beta 1, limit 0'"),
    "two limits": (BF16 | {"moe_limit": 10.0}, "with alpha 1.702, beta 1, limit 7 and 10'"),
    "LoRA": (BF16 | {"lora": True}, "LoRA is enabled"),
    "EPLB": (BF16 | {"eplb": True}, "EPLB moves experts"),
    "biases in a checkpoint's MXFP8": (
        {"bias": True},
        "ModelOptMxFp8FusedMoE is left alone: it makes no parameters for biases, and these experts have some",
    ),
    "the same of llm-compressor": (
        {"bias": True, "quantization": "compressed-tensors"},
        "CompressedTensorsW8A8Mxfp8MoEMethod is left alone: it makes no parameters for biases",
    ),
    "fused shared experts": (BF16 | {"fused_shared_experts": 1}, "shared experts are fused"),
    "weighted inputs": (BF16 | {"weights_input": True}, "the router weight is applied to the inputs"),
    "more ranks than experts": (BF16 | {"experts": 4, "ep_rank": 4}, "this rank holds no expert"),
}


@pytest.fixture
def asked(monkeypatch) -> list[LayerFacts]:
    """The facts of every layer that was asked for."""
    found: list[LayerFacts] = []
    choose = layer.choose

    def recorded(facts):
        found.append(facts)
        return choose(facts)

    monkeypatch.setattr(layer, "choose", recorded)
    monkeypatch.setenv("EPFUSE_STRICT", "1")
    return found


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(layer, "_said", set())
    monkeypatch.setattr(layer.log, "info", lambda form, *args: lines.append(form % args))
    return lines


def use(policy: Policy, monkeypatch) -> None:
    monkeypatch.setenv("EPFUSE_POLICY", policy.value)
    environment.cache_clear()


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("case", CASES)
def test_it_is_left_to_vllm_for_that_reason(case, policy, asked, said, monkeypatch):
    changes, words = CASES[case]
    deployment = M3_EP8.but(**changes)
    use(policy, monkeypatch)
    own = build(deployment, monkeypatch, RoutedExperts).quant_method.experts_cls
    assert build(deployment, monkeypatch).quant_method.experts_cls is own
    assert [line for line in said if words in line] == said
    assert len(said) == 1


def elsewhere(monkeypatch) -> Deployment:
    """A GPU that there are no kernels for."""
    monkeypatch.setattr(versions, "_target", lambda device: None)
    return M3_EP8


def another_method(monkeypatch) -> Deployment:
    """A quantisation method whose weights we don't read."""
    monkeypatch.delitem(versions.METHODS, "ModelOptMxFp8FusedMoE")
    return M3_EP8


def better_left(monkeypatch) -> Deployment:
    """A quantisation method whose weights epfuse could read, but not better."""
    monkeypatch.setitem(versions.LEFT, "ModelOptMxFp8FusedMoE", "it takes half the bytes.")
    return M3_EP8


def masked(monkeypatch) -> Deployment:
    """AITER in a release that then hands out masks."""
    from vllm._aiter_ops import rocm_aiter_ops

    monkeypatch.setattr(rocm_aiter_ops, "is_fused_moe_enabled", lambda: True)
    monkeypatch.setattr(versions, "_has_per_kernel_map", lambda: False)
    return M3_EP8


def invariant(monkeypatch) -> Deployment:
    """Results that must not depend on the batch."""
    import vllm.envs

    monkeypatch.setattr(vllm.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    return M3_EP8.but(quantization=None)


def deepep_in_rows(monkeypatch) -> Deployment:
    """Tokens exchanged by DeepEP's kernels for prefill, which are not installed here."""
    kernels = SimpleNamespace(maybe_roundup_layer_hidden_size=lambda size, dtype: size)
    monkeypatch.setattr(all2all_utils, "DeepEPHTPrepareAndFinalize", kernels, raising=False)
    return M3_EP8.but(target=Target.SM90, dp_size=2, all2all="deepep_high_throughput")


ELSEWHERE: dict[Callable[..., Deployment], str] = {
    elsewhere: "this device is none of them",
    better_left: "ModelOptMxFp8FusedMoE is left alone: it takes half the bytes.",
    another_method: "is not one of the weight formats",
    masked: "0/1 mask as expert map",
    invariant: "VLLM_BATCH_INVARIANT=1",
    deepep_in_rows: "tokens are exchanged by deepep_high_throughput",
}


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("prepare", ELSEWHERE)
def test_so_are_surroundings_that_do_not_fit(prepare, policy, asked, said, monkeypatch):
    use(policy, monkeypatch)
    deployment = prepare(monkeypatch)
    own = build(deployment, monkeypatch, RoutedExperts).quant_method.experts_cls
    assert build(deployment, monkeypatch).quant_method.experts_cls is own
    assert ELSEWHERE[prepare] in said[0]


def batched(facts: LayerFacts) -> LayerFacts:
    """With DeepEP's decode kernels. vLLM builds no MXFP8 layer so unless DeepEP and humming are installed."""
    return replace(facts, all2all="deepep_low_latency", is_batched=True)


def test_batched_activations_are_refused(asked, monkeypatch):
    build(M3_EP8, monkeypatch)
    assert refusal(asked[0]) is None
    assert refusal(batched(asked[0])).startswith("deepep_low_latency brings activations as [E, capacity, H]")


def test_every_refusal_has_a_case(asked, monkeypatch):
    use(Policy.AUTO, monkeypatch)
    for changes, _ in CASES.values():
        build(M3_EP8.but(**changes), monkeypatch)
    for prepare in ELSEWHERE:
        with monkeypatch.context() as only:
            build(prepare(only), monkeypatch)
    build(M3_EP8, monkeypatch)
    asked.append(batched(asked[-1]))
    first = {next((place for place, entry in enumerate(REFUSALS) if entry.applies(facts)), None) for facts in asked}
    assert first == {*range(len(REFUSALS)), None}
