"""Our experts beside vLLM's own, built, loaded and called by vLLM's code, in Triton's interpreter."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.v1.worker import workspace

import epfuse.api
from epfuse.config import Path, Policy, SwiGLUOAI
from epfuse.environment import environment
from epfuse.errors import ConfigError
from epfuse.integrations.vllm.experts import EpfuseExperts
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.target import REFERENCE_DEVICE, Target
from tests.integrations.vllm import compiled_ops
from tests.integrations.vllm.deployments import M3_EP8, Deployment, build

ACTIVATION = SwiGLUOAI()
SMALL = M3_EP8.but(hidden=128, intermediate=64, experts=8, top_k=2, ep_size=2, device="cpu")
TOKENS = (1, 3, 37)


@pytest.fixture(autouse=True)
def workspaces(monkeypatch):
    """vLLM's own workspace manager, its memory full of NaN before every call."""
    manager = workspace.WorkspaceManager(torch.device("cpu"))
    monkeypatch.setattr(workspace, "_manager", manager)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # there is no accelerator
    monkeypatch.setenv("EPFUSE_STRICT", "1")
    get = manager.get_simultaneous

    def get_poisoned(*wanted):
        found = get(*wanted)
        for tensor in found:
            tensor.fill_(float("nan"))
        return found

    monkeypatch.setattr(manager, "get_simultaneous", get_poisoned)


def parameters(deployment: Deployment) -> dict[str, torch.Tensor]:
    """A rank's weights as a checkpoint has them."""
    generator = torch.Generator().manual_seed(5)
    local = deployment.experts // deployment.ep_size
    w13 = torch.randn(local, 2 * deployment.intermediate, deployment.hidden, generator=generator) / 8
    w2 = torch.randn(local, deployment.hidden, deployment.intermediate, generator=generator) / 8
    if deployment.quantization is None:
        return {"w13_weight": w13.bfloat16(), "w2_weight": w2.bfloat16()}
    first, second = MXFP8.quantize(w13.bfloat16()), MXFP8.quantize(w2.bfloat16())
    return {
        "w13_weight": first.values,
        "w13_weight_scale": first.scales,
        "w2_weight": second.values,
        "w2_weight_scale": second.scales,
    }


def loaded(deployment: Deployment, monkeypatch, layer_cls: type | None = None) -> Any:
    """A layer with weights, its kernel object made by vLLM."""
    layer = build(deployment, monkeypatch, *([] if layer_cls is None else [layer_cls]))
    for name, tensor in parameters(deployment).items():
        getattr(layer, name).data.copy_(tensor)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def call(layer: Any, tokens: int, padding: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    config = layer.moe_config
    hidden = torch.randn(tokens, config.hidden_dim, generator=generator).bfloat16()
    scores = torch.rand(tokens, config.num_experts, generator=generator)
    weights, ids = scores.topk(config.experts_per_token)
    ids = ids.int()
    if padding:
        ids[tokens // 2 :] = -1
    return layer.quant_method.apply(layer, hidden, weights, ids, None, None)


def interpret(deployment: Deployment, monkeypatch) -> None:
    """Let `fused_experts` launch the target's kernels on the CPU's tensors."""
    monkeypatch.setattr(epfuse.api, "target_of", lambda device: deployment.target)
    monkeypatch.setattr(epfuse.api, "device_name", lambda device: REFERENCE_DEVICE[deployment.target])


@pytest.mark.parametrize("target", [Target.GFX942, Target.GFX950])
@pytest.mark.parametrize("quantization", ["modelopt", "compressed-tensors", None])
@pytest.mark.parametrize("tokens", TOKENS)
def test_ours_is_vllms_own_result(quantization, target, tokens, monkeypatch):
    deployment = SMALL.but(quantization=quantization, target=target)
    own = loaded(deployment.but(target=Target.GFX942), monkeypatch, RoutedExperts)
    compiled_ops.give(own.quant_method.moe_kernel.fused_experts, ACTIVATION, monkeypatch)
    expected = call(own, tokens)
    ours = loaded(deployment, monkeypatch)
    assert type(ours.quant_method.moe_kernel.fused_experts) is EpfuseExperts
    interpret(deployment, monkeypatch)
    got = call(ours, tokens)
    assert got.isfinite().all()
    # both round to BF16 after each GEMM; ours once less, since the routes are summed in FP32 in one kernel
    torch.testing.assert_close(got.float(), expected.float(), rtol=2**-6, atol=2**-6 * expected.abs().max().item())


def test_padding_rows_are_zero(monkeypatch):
    ours = loaded(SMALL, monkeypatch)
    interpret(SMALL, monkeypatch)
    got = call(ours, 6, padding=True)
    assert not got[3:].any()
    torch.testing.assert_close(got[:3], call(ours, 6)[:3], rtol=0, atol=0)


def test_mxfp8_weights_stay_in_their_own_memory(monkeypatch):
    layer = build(SMALL, monkeypatch)
    before = {name: getattr(layer, name).data_ptr() for name in parameters(SMALL)}
    layer = loaded(SMALL, monkeypatch)
    kept = layer.quant_method.moe_kernel.fused_experts._loaded.weights
    assert list(kept.nbytes.values()) == [sum(getattr(layer, name).nbytes for name in before)]
    assert kept.mxfp8_experts.w13.values.data_ptr() == layer.w13_weight.data_ptr()
    assert kept.mxfp8_experts.w2.values.dtype == torch.float8_e4m3fnuz


def test_loading_twice_changes_nothing(monkeypatch):
    layer = loaded(SMALL, monkeypatch)
    experts = layer.quant_method.moe_kernel.fused_experts
    first = experts._loaded
    experts.load(layer, first.plan)
    assert experts._loaded is first


def test_other_weights_are_refused(monkeypatch):
    layer = loaded(SMALL, monkeypatch)
    layer.w13_weight.data = layer.w13_weight.data.clone()
    with pytest.raises(ConfigError, match="no reload"):
        call(layer, 1)


def test_another_expert_map_is_refused(monkeypatch):
    layer = loaded(SMALL, monkeypatch)
    layer._expert_map = layer._expert_map.clone()
    with pytest.raises(ConfigError, match="another expert map"):
        call(layer, 1)


def test_workspace_shapes_grow_with_the_tokens(monkeypatch):
    experts = loaded(SMALL, monkeypatch).quant_method.moe_kernel.fused_experts
    sizes = []
    for tokens in (1, 2, 64, 8192):
        shapes = experts.workspace_shapes(tokens, 128, 128, 2, 8, 4, None, None)
        assert shapes[2] == (tokens, 128)
        sizes.append([torch.Size(shape).numel() for shape in shapes])
    assert sizes == sorted(sizes)


def test_the_interface_is_vllms(monkeypatch):
    """Every abstract method is there, with the parameters that vLLM passes."""
    assert not inspect.isabstract(EpfuseExperts)
    base = EpfuseExperts.__mro__[1]
    for name in ("apply", "workspace_shapes"):
        assert list(inspect.signature(getattr(EpfuseExperts, name)).parameters) == list(
            inspect.signature(getattr(base, name)).parameters
        )


@pytest.mark.parametrize("max_model_len", [4096, 9472])
def test_the_seeds_plans_run(max_model_len, monkeypatch):
    """The seed's storages on a layer too small for its gates, which are opened."""
    from epfuse.policy import seed_1782

    monkeypatch.setattr(seed_1782, "GATES", ())
    monkeypatch.setenv("EPFUSE_POLICY", Policy.SEED_1782.value)
    environment.cache_clear()
    deployment = SMALL.but(ep_size=8, max_model_len=max_model_len)
    layer = loaded(deployment, monkeypatch)
    kept = layer.quant_method.moe_kernel.fused_experts._loaded
    assert kept.path(4) is Path.BF16
    assert (layer.w13_weight.dtype == torch.bfloat16) == (max_model_len == 9472)
    interpret(deployment, monkeypatch)
    own = loaded(deployment, monkeypatch, RoutedExperts)
    compiled_ops.give(own.quant_method.moe_kernel.fused_experts, ACTIVATION, monkeypatch)
    for tokens in (3, 37):
        expected = call(own, tokens).float()
        error = call(layer, tokens).float() - expected
        fp8 = kept.path(tokens) is Path.W8A8  # activations rounded to three bits of mantissa, twice
        assert error.abs().max() <= (0.2 if fp8 else 2**-6) * expected.abs().max()
