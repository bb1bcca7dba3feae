"""SGLang's linear layers of an MXFP8 checkpoint, in BF16 where it has no kernel for them."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.model_loader.loader import DefaultModelLoader

from epfuse.errors import ConfigError
from epfuse.integrations.sglang import dense
from epfuse.integrations.sglang.dense import DenseMxfp8Method
from epfuse.numerics.mxfp8 import decode, encode
from epfuse.target import Target
from tests.integrations.sglang.deployment import MXFP8_CONFIG, Deployment, installed

CPU = torch.device("cpu")
N, K = 48, 64


@pytest.fixture
def build(monkeypatch):
    deployment = Deployment(target=Target.SM90)
    with installed(), deployment.entered(monkeypatch):
        config = Fp8Config.from_config(MXFP8_CONFIG)
        yield lambda: ReplicatedLinear(K, N, bias=False, quant_config=config, prefix="model.layers.0.self_attn.q_proj")


def numbers(seed: int):
    return encode(torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).bfloat16())


def put(layer, codes, scales):
    layer.weight.weight_loader(layer.weight, codes)
    layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scales)


def test_the_linear_is_exact_and_says_so(build, caplog):
    layer = build()
    assert isinstance(layer.quant_method, DenseMxfp8Method)
    codes, scales = numbers(0)
    put(layer, codes, scales)
    DefaultModelLoader.postprocess_weights(layer, CPU)
    assert torch.equal(layer.weight.double(), decode(codes, scales, torch.float64))
    x = torch.randn(3, K).bfloat16()
    assert torch.equal(layer(x)[0], torch.nn.functional.linear(x, layer.weight))


def test_an_update_lands_in_the_same_memory_and_a_partial_one_keeps_the_rest(build):
    layer = build()
    put(layer, *numbers(0))
    DefaultModelLoader.postprocess_weights(layer, CPU)
    address, before = layer.weight.data_ptr(), layer.weight.clone()
    DefaultModelLoader.restore_weights_before_loading(layer, CPU)
    DefaultModelLoader.postprocess_weights(layer, CPU)
    assert torch.equal(layer.weight, before)
    DefaultModelLoader.restore_weights_before_loading(layer, CPU)
    codes, scales = numbers(1)
    put(layer, codes, scales)
    DefaultModelLoader.postprocess_weights(layer, CPU)
    assert layer.weight.data_ptr() == address
    assert torch.equal(layer.weight.double(), decode(codes, scales, torch.float64))


def test_a_load_over_bf16_is_refused(build):
    layer = build()
    put(layer, *numbers(0))
    DefaultModelLoader.postprocess_weights(layer, CPU)
    with pytest.raises(ConfigError, match="begin_weight_update"):
        layer.weight.weight_loader(layer.weight, numbers(1)[0])


def test_the_ends_of_bf16s_range_are_counted_and_refused(monkeypatch):
    said = []
    monkeypatch.setattr(dense.log, "warning", lambda form, *args: said.append(form % args))

    def made(byte):
        codes, scales = numbers(0)
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(codes, requires_grad=False)
        layer.weight_scale_inv = torch.nn.Parameter(torch.full_like(scales, byte), requires_grad=False)
        DenseMxfp8Method(SimpleNamespace(), "q_proj").process_weights_after_loading(layer)
        return layer

    made(127)
    assert not said
    layer = made(0)
    exact = decode(numbers(0)[0], torch.zeros(N, K // 32, dtype=torch.uint8), torch.float64)
    lost = int((exact != layer.weight.double()).sum())
    assert lost > 0
    assert f"{lost} weights" in said[0]
    with pytest.raises(ConfigError, match="over BF16's range"):
        made(254)


def test_the_users_kernel_is_kept(monkeypatch):
    deployment = Deployment(target=Target.SM90, server={"fp8_gemm_runner_backend": "triton"})
    with installed(), deployment.entered(monkeypatch):
        layer = ReplicatedLinear(K, N, bias=False, quant_config=Fp8Config.from_config(MXFP8_CONFIG), prefix="q")
    assert not isinstance(layer.quant_method, DenseMxfp8Method)
    assert logging.getLogger("sglang.srt.epfuse").name  # the plugin's own logger lies below SGLang's
