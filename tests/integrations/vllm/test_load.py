"""What a layer's tensors become, without vLLM: bytes stay bytes, and what is not the plan's is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from epfuse.config import LayerShape, SwiGLUOAI
from epfuse.errors import DtypeError, EpfuseError, ShapeError
from epfuse.integrations.load import Parameters, load_layer
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.policy import Checkpoint, LayerPlan, LayerRequest, plan_layer
from epfuse.target import Target

L, H, I = 2, 64, 32  # noqa: E741


def plan(target: Target) -> LayerPlan:
    shape = LayerShape(hidden=H, intermediate=I, experts=L, local_experts=L, top_k=1)
    request = LayerRequest(target, shape, 1, 4096, 0, (0,), SwiGLUOAI(), Checkpoint.MXFP8)
    return plan_layer(request)


def parameters() -> Parameters:
    generator = torch.Generator().manual_seed(3)
    w13 = MXFP8.quantize(torch.randn(L, 2 * I, H, generator=generator).bfloat16())
    w2 = MXFP8.quantize(torch.randn(L, H, I, generator=generator).bfloat16())
    return Parameters(w13.values, w2.values, w13.scales, w2.scales, None)


def in_e8m0(given: Parameters) -> Parameters:
    scales = {name: getattr(given, name).view(torch.float8_e8m0fnu) for name in ("w13_scale", "w2_scale")}
    return replace(given, **scales)


@pytest.mark.parametrize("target", [Target.CPU, Target.GFX942])
def test_scales_are_the_same_bytes_in_either_dtype(target):
    expected, got = (
        load_layer(plan(target), given, SwiGLUOAI()).weights.mxfp8_experts
        for given in (parameters(), in_e8m0(parameters()))
    )
    for one, other in ((expected.w13, got.w13), (expected.w2, got.w2)):
        assert one.scales.any()
        assert torch.equal(one.scales.view(torch.uint8), other.scales.view(torch.uint8))
        assert torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8))


@pytest.mark.parametrize("name", ["w13", "w2", "w13_scale", "w2_scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_other_bytes_are_refused_by_name(dtype, name):
    given = parameters()
    tensor = getattr(given, name)
    other = tensor.float() if dtype.itemsize == 4 else tensor.view(torch.uint8).view(dtype)
    with pytest.raises(DtypeError, match=name):
        load_layer(plan(Target.CPU), replace(given, **{name: other}), SwiGLUOAI())


def test_weights_of_another_size_are_refused_by_name():
    given = parameters()
    with pytest.raises(ShapeError, match=r"w2 has shape \(2, 32, 32\); the layer was planned with \(2, 64, 32\)"):
        load_layer(plan(Target.CPU), replace(given, w2=given.w2[:, :32]), SwiGLUOAI())


def test_scales_that_are_missing_are_refused():
    with pytest.raises(EpfuseError, match="no scales"):
        load_layer(plan(Target.CPU), replace(parameters(), w2_scale=None), SwiGLUOAI())
