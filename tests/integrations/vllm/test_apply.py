"""Our experts beside vLLM's own, built, loaded and called by vLLM's code, in Triton's interpreter."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.v1.worker import workspace

import epfuse.api
from epfuse.config import Path, Policy, SwiGLUOAI
from epfuse.environment import environment
from epfuse.errors import ConfigError, ShapeError
from epfuse.integrations.vllm.experts import EpfuseExperts
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.policy import Storage, rivals
from epfuse.target import REFERENCE_DEVICE, Target
from tests.integrations.vllm import compiled_ops
from tests.integrations.vllm.deployments import M3_EP8, Deployment, build, local_experts

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
    local = local_experts(deployment)
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
    if target is Target.GFX950:  # its kernels are right, although the policy does not know of them whether they win
        taken = [(target, "Mxfp8NativeTritonExperts", Path.W8A16), (target, "TritonExperts", Path.BF16)]
        evidence = dict.fromkeys(taken, rivals.Evidence(""))
        monkeypatch.setattr(rivals, "EVIDENCE", evidence)
    ours = loaded(deployment, monkeypatch)
    assert type(ours.quant_method.moe_kernel.fused_experts) is EpfuseExperts
    interpret(deployment, monkeypatch)
    got = call(ours, tokens)
    assert got.isfinite().all()
    # both round to BF16 after each GEMM; ours once less, since the routes are summed in FP32 in one kernel
    torch.testing.assert_close(got.float(), expected.float(), rtol=2**-6, atol=2**-6 * expected.abs().max().item())


@pytest.mark.parametrize("quantization", ["modelopt", None])
def test_a_limit_of_silu_is_vllms_clamp(quantization, monkeypatch):
    """DeepSeek-V4's activation; the limit is one that most rows reach, and vLLM's own function is the judge."""
    clamped = SMALL.but(quantization=quantization, activation="silu", alpha=None, beta=None, limit=0.5)
    own = loaded(clamped, monkeypatch, RoutedExperts)
    compiled_ops.give(own.quant_method.moe_kernel.fused_experts, None, monkeypatch)
    with torch.compiler.set_stance("force_eager"):  # vLLM has the clamp compiled; in C++ that takes half a minute
        expected = call(own, 3).float()
    ours = loaded(clamped, monkeypatch)
    experts = ours.quant_method.moe_kernel.fused_experts
    assert experts._loaded.activation == SwiGLUOAI(1.0, 0.0, 0.5)
    interpret(clamped, monkeypatch)
    got = call(ours, 3).float()
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_with_different_numbers_of_experts(rank, monkeypatch):
    uneven = SMALL.but(quantization=None, experts=7, ep_rank=rank)
    own = loaded(uneven, monkeypatch, RoutedExperts)
    compiled_ops.give(own.quant_method.moe_kernel.fused_experts, ACTIVATION, monkeypatch)
    expected = call(own, 3).float()
    ours = loaded(uneven, monkeypatch)
    assert ours.quant_method.moe_kernel.fused_experts._loaded.expert_map.num_local == 4 - rank
    interpret(uneven, monkeypatch)
    got = call(ours, 3).float()
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())


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


def test_weights_are_not_loaded_over_rearranged_ones(monkeypatch):
    layer = loaded(SMALL, monkeypatch)
    interpret(SMALL, monkeypatch)
    expected = call(layer, 3)
    for expert in range(SMALL.experts):  # those of other ranks are skipped, as vLLM does
        local = layer._map_global_expert_id_to_local_expert_id(expert) >= 0
        matrix = torch.zeros(SMALL.hidden, SMALL.intermediate).to(torch.float8_e4m3fn)
        load = {"weight_name": "w2_weight", "shard_id": "w2", "expert_id": expert}
        with pytest.raises(ConfigError, match="supports no reload") if local else nullcontext():
            layer.weight_loader(layer.w2_weight, matrix, **load)
    torch.testing.assert_close(call(layer, 3), expected, rtol=0, atol=0)


def test_dense_weights_can_be_loaded_again(monkeypatch):
    dense = SMALL.but(quantization=None)
    layer = loaded(dense, monkeypatch)
    interpret(dense, monkeypatch)
    before = call(layer, 3)
    for expert in range(dense.experts):
        matrix = torch.zeros(dense.hidden, dense.intermediate, dtype=torch.bfloat16)
        layer.weight_loader(layer.w2_weight, matrix, "w2_weight", shard_id="w2", expert_id=expert)
    assert before.any()
    assert not call(layer, 3).any()


def test_parameters_that_are_not_read_are_refused(monkeypatch):
    layer = build(SMALL.but(quantization=None), monkeypatch)
    layer.register_parameter("w13_bias", torch.nn.Parameter(torch.zeros(4, 128)))
    with pytest.raises(ConfigError, match="has w13_bias, which epfuse does not compute with"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_hook_between_the_gemms_and_the_sum_is_refused(monkeypatch):
    layer = loaded(SMALL, monkeypatch)
    layer.quant_method.moe_kernel.fused_experts.post_gemm2_hook = lambda rows, output: None
    with pytest.raises(ConfigError, match="post_gemm2_hook"):
        call(layer, 1)


def test_another_activation_is_refused(monkeypatch):
    layer = loaded(SMALL, monkeypatch)
    layer.activation = type(layer.activation).from_str("silu")
    with pytest.raises(ConfigError, match="calls with activation silu; it loaded swigluoai_uninterleave"):
        call(layer, 1)


def test_another_expert_map_is_refused(monkeypatch):
    layer = loaded(SMALL, monkeypatch)
    layer._expert_map = layer._expert_map.clone()
    with pytest.raises(ConfigError, match="another expert map"):
        call(layer, 1)


def workspace_sizes(experts: EpfuseExperts, tokens: int) -> list[int]:
    shapes = experts.workspace_shapes(tokens, 128, 128, 2, 8, 4, None, None)
    assert shapes[2] == (tokens, 128)
    return [torch.Size(shape).numel() for shape in shapes]


def test_workspace_shapes_grow_with_the_tokens(monkeypatch):
    experts = loaded(SMALL, monkeypatch).quant_method.moe_kernel.fused_experts
    sizes = [workspace_sizes(experts, tokens) for tokens in (1, 2, 64, 8192)]
    assert sizes == sorted(sizes)
    assert sizes[1] == [2 * 2 * 64, 2 * 2 * 128, 2 * 128]  # [R, I], [R, H], [T, H]
    unloaded = EpfuseExperts(experts.moe_config, experts.quant_config)
    assert workspace_sizes(unloaded, 2) >= sizes[1]


def spied(experts: EpfuseExperts, monkeypatch) -> list[dict[str, Any]]:
    """What vLLM hands to every `apply`."""
    given: list[dict[str, Any]] = []
    apply = experts.apply

    def recorded(**arguments):
        given.append(arguments)
        apply(**arguments)

    monkeypatch.setattr(experts, "apply", recorded)
    return given


@pytest.mark.parametrize("quantization", ["modelopt", None])
def test_rows_lie_in_vllms_workspaces_which_output_is_a_part_of(quantization, monkeypatch):
    deployment = SMALL.but(quantization=quantization)
    layer = loaded(deployment, monkeypatch)
    interpret(deployment, monkeypatch)
    call(layer, 37)
    workspace.current_workspace_manager().lock()
    given = spied(layer.quant_method.moe_kernel.fused_experts, monkeypatch)
    allocated: list[torch.Tensor] = []
    empty = torch.empty

    def recorded(*size, **options):
        allocated.append(empty(*size, **options))
        return allocated[-1]

    monkeypatch.setattr(torch, "empty", recorded)
    for tokens in (37, 3):
        assert call(layer, tokens).isfinite().all()
    assert {tensor.dtype for tensor in allocated} == {torch.int32}  # route tables
    for arguments in given:
        assert arguments["output"].data_ptr() == arguments["workspace13"].data_ptr()
        assert not arguments["workspace2"].isnan().all()


def test_a_workspace_that_is_too_small_is_refused(monkeypatch):
    layer = loaded(SMALL, monkeypatch)
    interpret(SMALL, monkeypatch)
    monkeypatch.setattr(EpfuseExperts, "workspace_shapes", lambda self, M, N, K, *_: ((M, N), (M, K), (M, K)))
    with pytest.raises(ShapeError, match=r"scratch\.routed has 384 elements; this call needs 768"):
        call(layer, 3)


def test_the_interface_is_vllms(monkeypatch):
    """Every abstract method is there, with the parameters that vLLM passes."""
    assert not inspect.isabstract(EpfuseExperts)
    base = EpfuseExperts.__mro__[1]
    for name in ("apply", "workspace_shapes"):
        assert list(inspect.signature(getattr(EpfuseExperts, name)).parameters) == list(
            inspect.signature(getattr(base, name)).parameters
        )


def loaded_online(deployment: Deployment, monkeypatch, layer_cls: type | None = None) -> Any:
    """A layer whose BF16 checkpoint vLLM's loaders quantise as soon as its last weight has come, expert by expert."""
    layer = build(deployment, monkeypatch, *([] if layer_cls is None else [layer_cls]))
    given = parameters(deployment.but(quantization=None))
    gate_up, down, width = given["w13_weight"], given["w2_weight"], deployment.intermediate
    for expert in range(deployment.experts):  # a checkpoint has all of them; vLLM skips other ranks'
        local = expert % gate_up.shape[0]
        for name, shard, matrix in (
            ("w13_weight", "w1", gate_up[local, :width]),
            ("w13_weight", "w3", gate_up[local, width:]),
            ("w2_weight", "w2", down[local]),
        ):
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, matrix, f"{name}.{shard}", shard_id=shard, expert_id=expert)
    layer.quant_method.process_weights_after_loading(layer)  # as vLLM does once more for the whole model
    return layer


@pytest.mark.parametrize("tokens", TOKENS)
def test_weights_that_are_quantised_while_loading(tokens, monkeypatch):
    deployment = SMALL.but(quantization="online")
    own = loaded_online(deployment, monkeypatch, RoutedExperts)
    compiled_ops.give(own.quant_method.moe_kernel.fused_experts, ACTIVATION, monkeypatch)
    expected = call(own, tokens).float()
    ours = loaded_online(deployment, monkeypatch)
    experts = ours.quant_method.moe_kernel.fused_experts
    assert type(experts) is EpfuseExperts
    assert experts._loaded.plan.storage is Storage.MXFP8
    assert ours.w13_weight.dtype.itemsize == 1
    assert experts._loaded.weights.mxfp8_experts.w13.values.data_ptr() == ours.w13_weight.data_ptr()
    interpret(deployment, monkeypatch)
    got = call(ours, tokens).float()
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())


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
    experts = layer.quant_method.moe_kernel.fused_experts
    sizes = [workspace_sizes(experts, tokens) for tokens in (1, 8, 9, 831, 832)]
    assert sizes == sorted(sizes)  # although the paths take turns
    expected_of = {tokens: call(own, tokens).float() for tokens in (3, 37)}
    call(layer, 37)
    workspace.current_workspace_manager().lock()
    for tokens, expected in expected_of.items():
        error = call(layer, tokens).float() - expected
        fp8 = kept.path(tokens) is Path.W8A8  # activations rounded to three bits of mantissa, twice
        assert error.abs().max() <= (0.2 if fp8 else 2**-6) * expected.abs().max()
