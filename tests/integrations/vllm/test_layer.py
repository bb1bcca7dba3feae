"""Which class vLLM's own code ends up with, for deployments that are pretended."""

from __future__ import annotations

import sys

import pytest
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from epfuse.config import Path, Policy
from epfuse.environment import environment
from epfuse.integrations import vllm as integration
from epfuse.integrations.vllm import layer, stand_in, versions
from epfuse.integrations.vllm.experts import EpfuseExperts
from epfuse.policy import Storage
from epfuse.target import Target
from tests.integrations.vllm.deployments import M3_EP8, Deployment, build


def experts_of(deployment: Deployment, monkeypatch, policy: Policy = Policy.AUTO) -> type:
    monkeypatch.setenv("EPFUSE_POLICY", policy.value)
    monkeypatch.setenv("EPFUSE_STRICT", "1")
    environment.cache_clear()
    return build(deployment, monkeypatch).quant_method.experts_cls


def vllms_own(deployment: Deployment, monkeypatch) -> type:
    return build(deployment, monkeypatch, RoutedExperts).quant_method.experts_cls


@pytest.mark.parametrize("quantization", ["modelopt", "compressed-tensors", "online", None])
@pytest.mark.parametrize("target", [Target.GFX942, Target.SM90])
def test_auto_takes_minimax_m3(quantization, target, monkeypatch):
    deployment = M3_EP8.but(quantization=quantization, target=target)
    assert experts_of(deployment, monkeypatch) is EpfuseExperts
    assert vllms_own(deployment, monkeypatch) is not EpfuseExperts


def test_what_can_not_be_asked_is_left_to_vllm_and_said_once(monkeypatch):
    """What computes is imported by the first layer: where that fails a model has sixty layers that fail alike."""
    said: list[str] = []
    monkeypatch.setattr(stand_in.log, "exception", lambda form, *args: said.append(form % args))
    monkeypatch.setattr(stand_in, "_failed", set())
    own = vllms_own(M3_EP8, monkeypatch)
    with monkeypatch.context() as broken:
        broken.delattr(integration, "layer")
        broken.setitem(sys.modules, layer.__name__, None)  # importing it fails
        assert [build(M3_EP8, monkeypatch).quant_method.experts_cls for _ in range(3)] == [own] * 3
        broken.setenv("EPFUSE_STRICT", "1")
        with pytest.raises(ImportError):
            build(M3_EP8, monkeypatch)
    assert len(said) == 1
    assert said[0].endswith("to vLLM, and so each layer like it: asking failed")


@pytest.mark.parametrize(
    "changes",
    [
        {"ep_size": 4},
        {"ep_size": 1},
        {"hidden": 4096},
        {"activation": "silu", "alpha": None, "beta": None, "limit": None},
        {"activation": "silu", "alpha": None, "beta": None, "limit": 10.0},
        {"activation": "silu", "alpha": None, "beta": None, "limit": 10.0, "quantization": None},
        {"experts": 60, "ep_rank": 0, "quantization": None},
        {"experts": 60, "ep_rank": 7, "quantization": None},
        {"hidden": 4096, "quantization": None},
        {"hidden": 2880, "quantization": None},
        {"hidden": 2944, "quantization": None, "target": Target.SM90},
        {"max_model_len": 4096},
    ],
    ids=str,
)
def test_auto_takes_other_shapes(changes, monkeypatch):
    assert experts_of(M3_EP8.but(**changes), monkeypatch) is EpfuseExperts


def test_the_plan_is_for_the_gpu_that_is_there(monkeypatch):
    """An H200's plan takes an H200's tables, and so does its log."""
    found = []
    monkeypatch.setattr(versions, "_product", lambda device: "NVIDIA H200")
    monkeypatch.setattr(layer, "take_over", lambda *given: found.append(given[-1].plan))
    build(M3_EP8.but(target=Target.SM90), monkeypatch)
    (plan,) = found
    assert plan.request.device_name == "NVIDIA H200"
    assert "on NVIDIA H200" in plan.at(1024).tile_source


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target": Target.GFX950}, "faster than Mxfp8NativeTritonExperts on gfx950"),
        ({"target": Target.GFX950, "quantization": None}, "faster than TritonExperts on gfx950"),
        ({"hidden": 2880, "quantization": None, "target": Target.SM90}, "no multiples of 128: no measurement"),
    ],
    ids=str,
)
def test_auto_leaves_what_it_is_not_known_to_be_faster_at(changes, reason, monkeypatch):
    said = []
    monkeypatch.setattr(layer, "_said", set())
    monkeypatch.setattr(layer.log, "info", lambda form, *args: said.append(form % args))
    deployment = M3_EP8.but(**changes)
    own = vllms_own(deployment, monkeypatch)
    assert experts_of(deployment, monkeypatch) is own
    assert len(said) == 1
    assert said[0].startswith(f"epfuse leaves experts to vLLM's {own.__name__}: ")
    assert reason in said[0]


@pytest.mark.parametrize("max_model_len", [4096, 9472])
def test_the_seed_takes_the_profiled_layer(max_model_len, monkeypatch):
    assert experts_of(M3_EP8.but(max_model_len=max_model_len), monkeypatch, Policy.SEED_1782) is EpfuseExperts


@pytest.mark.parametrize(
    "changes",
    [
        {"ep_size": 4},
        {"hidden": 4096},
        {"intermediate": 1536},
        {"experts": 64},
        {"top_k": 8},
        {"shared_experts": 0},
        {"activation": "silu", "alpha": None, "beta": None, "limit": None},
        {"limit": 6.0},
        {"target": Target.GFX950},
        {"target": Target.SM90},
        {"quantization": None},
    ],
    ids=str,
)
def test_the_seed_leaves_everything_else(changes, monkeypatch):
    deployment = M3_EP8.but(**changes)
    assert experts_of(deployment, monkeypatch, Policy.SEED_1782) is vllms_own(deployment, monkeypatch)


def test_the_answer_is_logged_once(monkeypatch):
    said = []
    monkeypatch.setattr(layer, "_said", set())
    monkeypatch.setattr(layer.log, "info", lambda form, *args: said.append(form % args))
    for _ in range(3):
        experts_of(M3_EP8, monkeypatch)
    own = vllms_own(M3_EP8, monkeypatch).__name__
    assert [text.partition(":")[0] for text in said] == [
        f"epfuse runs experts in place of vLLM's {own}; policy auto, weights mxfp8"
    ]


@pytest.mark.parametrize("strict", [False, True])
def test_an_error_leaves_the_layer_to_vllm_unless_strict(strict, monkeypatch):
    def fail(*_):
        raise RuntimeError("asking broke")

    monkeypatch.setattr(layer, "choose", fail)
    if strict:
        with pytest.raises(RuntimeError, match="asking broke"):
            experts_of(M3_EP8, monkeypatch)
        return
    found = build(M3_EP8, monkeypatch).quant_method.experts_cls
    assert found is vllms_own(M3_EP8, monkeypatch)


def test_the_plan_of_the_seed_at_short_context_keeps_both_formats(monkeypatch):
    plans = []
    monkeypatch.setattr(layer, "take_over", lambda *args: plans.append(args[-1].plan))
    experts_of(M3_EP8.but(max_model_len=4096), monkeypatch, Policy.SEED_1782)
    assert plans[0].storage is Storage.HYBRID
    assert plans[0].at(256).path is Path.W8A8


def test_vllms_own_support_check_has_a_say(monkeypatch):
    monkeypatch.setattr(EpfuseExperts, "_supports_shape", staticmethod(lambda hidden: False))
    assert experts_of(M3_EP8, monkeypatch) is vllms_own(M3_EP8, monkeypatch)
