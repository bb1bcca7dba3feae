"""gpt-oss's experts: biases, and gate and up rows that alternate. Beside float64, and beside vLLM's own.

In BF16, and in the MXFP8 that ``--quantization mxfp8`` makes of BF16 while loading: the only one of vLLM's methods that
keeps biases beside MXFP8.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.models import gpt_oss

from epfuse.config import Bias, SwiGLUOAI
from epfuse.errors import ConfigError
from epfuse.integrations.vllm import stand_in, versions
from epfuse.integrations.vllm.experts import EpfuseExperts
from epfuse.policy import Storage
from epfuse.target import Target
from tests.cases import snr_db
from tests.integrations.vllm import compiled_ops
from tests.integrations.vllm.deployments import M3_EP8, QUANTIZATIONS, Deployment, build
from tests.integrations.vllm.test_apply import call, interpret, workspaces  # noqa: F401  (a fixture)

GPT_OSS = M3_EP8.but(
    quantization=None,
    hidden=128,
    intermediate=64,
    experts=8,
    top_k=2,
    ep_size=1,
    device="cpu",
    activation="swigluoai",
    alpha=None,
    beta=None,
    limit=None,
    bias=True,
)
ONLINE = GPT_OSS.but(quantization="online")
NAMES = ("w13_weight", "w13_bias", "w2_weight", "w2_bias")
FLOOR = 44.0
"""dB, as in tests/families/test_kinds.py."""
PER_EXPERT = getattr(gpt_oss, "GptOssRoutedExperts", None)
"""The class that loads gpt-oss one expert at a time; since 0.32."""


def checkpoint() -> dict[str, torch.Tensor]:
    """All experts as Hugging Face has them: ``[E, inputs, outputs]``, gate and up alternate; large biases."""
    g, shape = torch.Generator().manual_seed(5), (GPT_OSS.experts, GPT_OSS.hidden, 2 * GPT_OSS.intermediate)
    return {
        "w13_weight": (torch.randn(shape, generator=g) / 8).bfloat16(),
        "w13_bias": torch.randn(shape[0], shape[2], generator=g).bfloat16(),
        "w2_weight": (torch.randn(shape[0], GPT_OSS.intermediate, shape[1], generator=g) / 8).bfloat16(),
        "w2_bias": torch.randn(shape[:2], generator=g).bfloat16(),
    }


def loaded(deployment: Deployment, monkeypatch: Any, layer_cls: type | None = None) -> Any:
    """A rank's layer with its share of the checkpoint, as vLLM's model code cuts it."""
    layer = build(deployment, monkeypatch, *([] if layer_cls is None else [layer_cls]))
    width, rank = deployment.intermediate // deployment.tp_size, deployment.tp_rank
    experts = [e for e in range(deployment.experts) if layer._map_global_expert_id_to_local_expert_id(e) >= 0]
    for name, stack in checkpoint().items():
        if not hasattr(layer, name):
            continue  # without biases
        mine = stack[experts]
        if name == "w13_weight":
            mine = mine[:, :, 2 * width * rank : 2 * width * (rank + 1)].transpose(1, 2)
        elif name == "w13_bias":
            mine = mine[:, 2 * width * rank : 2 * width * (rank + 1)]
        elif name == "w2_weight":
            mine = mine[:, width * rank : width * (rank + 1)].transpose(1, 2)
        elif rank:
            mine = torch.zeros_like(mine)
        if deployment.quantization is None:
            getattr(layer, name).data.copy_(mine)
        else:  # a meta tensor so far, which the loader of the model's own class fills in
            setattr(layer, name, torch.nn.Parameter(mine.contiguous(), requires_grad=False))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def quantised(monkeypatch: Any) -> dict[str, torch.Tensor]:
    """The checkpoint with the numbers that vLLM's own layer keeps of it."""
    layer, found = loaded(ONLINE, monkeypatch, RoutedExperts), checkpoint()
    made = layer.quant_method._quantize_mxfp8_moe_weight
    for name in ("w13_weight", "w2_weight"):
        values, scales = made(found[name].transpose(1, 2).contiguous())
        powers = torch.exp2(scales.view(torch.uint8).double() - 127).repeat_interleave(32, dim=-1)
        found[name] = (values.double() * powers.reshape(values.shape)).transpose(1, 2)
    return found


def wanted(tokens: int, padding: bool = False, stored: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """The unsharded layer in float64, route by route, from the checkpoint's tensors alone."""
    g = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, GPT_OSS.hidden, generator=g).bfloat16().double()
    weights, ids = torch.rand(tokens, GPT_OSS.experts, generator=g).topk(GPT_OSS.top_k)
    if padding:
        ids[tokens // 2 :] = -1
    stacks = {name: tensor.double() for name, tensor in (stored or checkpoint()).items()}
    out = torch.zeros_like(hidden)
    for token in range(tokens):
        for expert, factor in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            if expert < 0:
                continue
            both = hidden[token] @ stacks["w13_weight"][expert] + stacks["w13_bias"][expert]
            gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
            row = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
            out[token] += factor * (row @ stacks["w2_weight"][expert] + stacks["w2_bias"][expert])
    return out


def experts_of(layer: Any) -> EpfuseExperts:
    experts = layer.quant_method.moe_kernel.fused_experts
    assert type(experts) is EpfuseExperts
    assert experts._loaded.weights.bias is Bias.ADDED
    # vLLM's weight cache would hand on parameters that have no memory of their own; 0.25.1 has none
    assert getattr(layer.quant_method, "supports_pre_processed_weights", False) is False
    return experts


def test_beside_float64_and_vllms_own(monkeypatch):
    """Both in Triton's interpreter; the other tests run the CPU's products."""
    tokens = 3
    own = loaded(GPT_OSS, monkeypatch, RoutedExperts)
    compiled_ops.give_gpt_oss(own.quant_method.moe_kernel.fused_experts, monkeypatch)
    theirs = call(own, tokens)
    ours = loaded(GPT_OSS, monkeypatch)
    assert experts_of(ours)._loaded.activation == SwiGLUOAI()
    interpret(GPT_OSS, monkeypatch)
    got, want = call(ours, tokens), wanted(tokens)
    assert snr_db(got, want) > FLOOR
    assert snr_db(got, want) > snr_db(theirs, want) - 1.0


def test_mxfp8_that_is_made_while_loading(monkeypatch):
    """In its own memory, gate rows before up rows, with the biases; in the interpreter, as a GPU's kernels run it."""
    layer, want = loaded(ONLINE, monkeypatch), wanted(3, stored=quantised(monkeypatch))
    kept = experts_of(layer)._loaded
    assert kept.plan.storage is Storage.MXFP8
    assert kept.weights.mxfp8_experts.w13.values.data_ptr() == layer.w13_weight.data_ptr()
    interpret(ONLINE, monkeypatch)
    got = call(layer, 3)
    assert snr_db(got, want) > FLOOR
    assert snr_db(got, wanted(3)) < 35.0  # the oracle is of the rounded weights
    for name in ("w13_bias", "w2_bias"):
        assert getattr(layer, name).untyped_storage().nbytes() == getattr(layer, name).element_size()
    layer.quant_method.process_weights_after_loading(layer)
    torch.testing.assert_close(call(layer, 3), got, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="supports no reload of these weights"):
        layer.weight_loader(layer.w2_weight, torch.zeros(2, 2), "w2_weight", shard_id="w2", expert_id=0)


def test_mxfp8_rows_that_alternate_without_biases(monkeypatch):
    deployment, stored = ONLINE.but(bias=False), quantised(monkeypatch)
    for name in ("w13_bias", "w2_bias"):
        stored[name] = torch.zeros_like(stored[name])
    layer = loaded(deployment, monkeypatch)
    assert layer.quant_method.moe_kernel.fused_experts._loaded.weights.bias is Bias.NONE
    interpret(deployment, monkeypatch)
    assert snr_db(call(layer, 3), wanted(3, stored=stored)) > FLOOR


def test_which_of_vllms_methods_keep_biases(monkeypatch):
    """As `versions.METHODS` says of each: those that don't would drop them, and the layer is left to vLLM."""
    for quantization in (None, *QUANTIZATIONS):
        layer = build(GPT_OSS.but(quantization=quantization), monkeypatch, RoutedExperts)
        known = versions.METHODS[type(layer.quant_method).__name__]
        assert {f"{name}_bias" in dict(layer.named_parameters()) for name in ("w13", "w2")} == {known.keeps_biases}


@pytest.mark.parametrize("whole", [GPT_OSS, ONLINE], ids=["bf16", "mxfp8"])
@pytest.mark.parametrize("ranks", [{"tp_size": 2}, {"ep_size": 2}], ids=str)
def test_ranks_add_up_to_the_unsharded_layer(ranks, whole, monkeypatch):
    """Down's bias counts once: vLLM gives it to the first of the ranks that share a width."""
    stored = None if whole is GPT_OSS else quantised(monkeypatch)
    total = torch.zeros(9, GPT_OSS.hidden, dtype=torch.float64)
    for rank in range(2):
        deployment = whole.but(**ranks, **{"tp_rank" if "tp_size" in ranks else "ep_rank": rank})
        layer = loaded(deployment, monkeypatch)
        experts_of(layer)
        if whole is ONLINE:  # prepared for a GPU
            interpret(deployment, monkeypatch)
        total += call(layer, 9, padding=True).double()
    assert snr_db(total, wanted(9, padding=True, stored=stored)) > FLOOR - 3
    assert not total[9 // 2 :].any()


def test_nothing_is_loaded_over_what_was_rearranged(monkeypatch):
    layer = loaded(GPT_OSS, monkeypatch)
    expected = call(layer, 3)
    for name in ("w13_weight", "w13_bias", "w2_bias"):
        parameter = getattr(layer, name)
        assert parameter.untyped_storage().nbytes() == parameter.element_size()  # what was loaded is free
        with pytest.raises(RuntimeError, match="single memory location"):
            parameter.data.copy_(torch.zeros(parameter.shape))
    layer.quant_method.process_weights_after_loading(layer)  # vLLM may do it twice
    torch.testing.assert_close(call(layer, 3), expected, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="supports no reload of these weights"):
        layer.weight_loader(layer.w2_weight, torch.zeros(2, 2), "w2_weight", shard_id="w2", expert_id=0)


def test_a_plan_for_biases_wants_both(monkeypatch):
    layer = build(GPT_OSS, monkeypatch)
    del layer.w13_bias
    monkeypatch.setattr(layer.quant_method, "get_fused_moe_quant_config", lambda _: plain_quant_config())
    with pytest.raises(ConfigError, match="has no w13_bias; its plan is for experts with biases"):
        layer.quant_method.process_weights_after_loading(layer)


def plain_quant_config() -> Any:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig

    return FusedMoEQuantConfig.make()


@pytest.mark.skipif(PER_EXPERT is None, reason="this release loads gpt-oss whole")
@pytest.mark.parametrize("whole", [GPT_OSS, ONLINE], ids=["bf16", "mxfp8"])
def test_the_models_own_class_is_replaced_too(whole, monkeypatch):
    """It loads one expert at a time; what it loads is what the tests above copy."""
    monkeypatch.delitem(op_registry_oot, "GptOssRoutedExperts", raising=False)
    stand_in._stand_in(PER_EXPERT)
    deployment = whole.but(tp_size=2, tp_rank=1)
    layer = build(deployment, monkeypatch, PER_EXPERT)
    assert type(layer).__name__ == "EpfuseGptOssRoutedExperts"
    for name, stack in checkpoint().items():
        for expert in range(deployment.experts):
            shard = f"gpt_oss_{name.partition('_')[0]}"
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, stack[expert], name, shard_id=shard, expert_id=expert)
    layer.quant_method.process_weights_after_loading(layer)
    experts_of(layer)
    copied = loaded(deployment, monkeypatch)
    if whole is ONLINE:
        interpret(deployment, monkeypatch)
    torch.testing.assert_close(call(layer, 5), call(copied, 5), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="supports no reload of these weights"):
        layer.weight_loader(layer.w2_weight, checkpoint()["w2_weight"][0], "w2_weight", "gpt_oss_w2", 0)


@pytest.mark.parametrize(
    ("product", "tp_size", "taken"),
    [("NVIDIA H200", 1, True), ("NVIDIA H200", 2, False), ("NVIDIA H100 80GB HBM3", 1, False)],
)
def test_on_hopper_it_is_taken_as_it_was_timed(product, tp_size, taken, monkeypatch):
    """Of true sizes, on tensors without data; tensor parallelism halves the experts' width."""
    monkeypatch.setattr(versions, "_product", lambda device: product)
    sizes = {"hidden": 2880, "intermediate": 2880, "experts": 32, "top_k": 4, "device": "meta"}
    built = build(GPT_OSS.but(target=Target.SM90, tp_size=tp_size, **sizes), monkeypatch)
    assert (built.quant_method.experts_cls is EpfuseExperts) is taken
