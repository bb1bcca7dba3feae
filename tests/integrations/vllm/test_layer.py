"""Which class vLLM's own code ends up with, for deployments that are pretended."""

from __future__ import annotations

import pytest
import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from epfuse.config import Path, Policy
from epfuse.environment import environment
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


@pytest.mark.parametrize(
    "changes",
    [
        {"ep_size": 4},
        {"ep_size": 1},
        {"hidden": 4096},
        {"activation": "silu", "alpha": None, "beta": None, "limit": None},
        {"target": Target.GFX950},
        {"max_model_len": 4096},
    ],
    ids=str,
)
def test_auto_takes_other_shapes(changes, monkeypatch):
    assert experts_of(M3_EP8.but(**changes), monkeypatch) is EpfuseExperts


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


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize(
    "changes",
    [
        {"backend": "triton", "quantization": None},
        {"backend": "marlin", "target": Target.SM90},
        {"lora": True, "quantization": None},
        {"eplb": True, "quantization": None},
        {"dp_size": 2},
        {"activation": "swigluoai", "quantization": None},
        {"dtype": torch.float16, "quantization": None},
    ],
    ids=str,
)
def test_both_policies_leave_what_is_refused(changes, policy, monkeypatch):
    deployment = M3_EP8.but(**changes)
    assert experts_of(deployment, monkeypatch, policy) is vllms_own(deployment, monkeypatch)


@pytest.mark.parametrize("policy", Policy)
def test_the_aiter_mask_is_refused_where_it_reaches_every_class(policy, monkeypatch):
    from vllm._aiter_ops import rocm_aiter_ops

    from epfuse.integrations.vllm import versions

    monkeypatch.setattr(rocm_aiter_ops, "is_fused_moe_enabled", lambda: True)
    taken = experts_of(M3_EP8, monkeypatch, policy) is EpfuseExperts
    assert taken == versions._has_per_kernel_map()


def test_the_answer_is_logged_once(monkeypatch):
    from epfuse.integrations.vllm import layer

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
    from epfuse.integrations.vllm import layer

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
    from epfuse.integrations.vllm import layer

    plans = []
    monkeypatch.setattr(layer, "take_over", lambda *args: plans.append(args[-1].plan))
    experts_of(M3_EP8.but(max_model_len=4096), monkeypatch, Policy.SEED_1782)
    assert plans[0].storage is Storage.HYBRID
    assert plans[0].at(256).path is Path.W8A8


def test_vllms_own_support_check_has_a_say(monkeypatch):
    monkeypatch.setattr(EpfuseExperts, "_supports_shape", staticmethod(lambda hidden: False))
    assert experts_of(M3_EP8, monkeypatch) is vllms_own(M3_EP8, monkeypatch)


def test_batch_invariance_is_left_to_vllm(monkeypatch):
    import vllm.envs

    monkeypatch.setattr(vllm.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    deployment = M3_EP8.but(quantization=None)
    assert experts_of(deployment, monkeypatch) is vllms_own(deployment, monkeypatch)
