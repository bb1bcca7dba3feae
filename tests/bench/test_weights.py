from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from epfuse import ExpertWeights
from epfuse.bench.inputs import draw_inputs
from epfuse.bench.layers import LAYERS, Layer
from epfuse.bench.routing import Routing
from epfuse.bench.weights import LayerWeights
from epfuse.config import Bias, LayerShape, SwiGLUOAI, WeightFormat
from epfuse.reference import run_reference

CPU = torch.device("cpu")
ODD = Layer("", LayerShape(40, 24, 8, 4, 2), SwiGLUOAI())
BIASED = replace(LAYERS["small"], bias=Bias.ADDED)


@pytest.mark.parametrize("layer", [LAYERS["small"], ODD, BIASED], ids=["mxfp8", "dense", "biases"])
def test_the_oracle_agrees_with_the_reference_in_float64(layer: Layer) -> None:
    weights = LayerWeights(layer, 0, CPU)
    assert weights.quantised == (layer is not ODD)
    for inputs in draw_inputs(layer, Routing.parse("uniform"), 5, 0, CPU, 0)[:2]:
        call = (inputs.hidden, weights.source, inputs.topk_weights, inputs.topk_ids, inputs.expert_map)
        other = run_reference(*call, layer.activation, compute=torch.float64)
        assert torch.allclose(weights.oracle(inputs), other, rtol=1e-10, atol=1e-12)


def test_every_format_has_the_same_numbers() -> None:
    weights = LayerWeights(LAYERS["small"], 3, CPU)
    dense, packed = weights.in_format(WeightFormat.DENSE), weights.in_format(WeightFormat.MXFP8)
    assert dense.dense_experts is not None
    assert packed.mxfp8_experts is not None
    exact = packed.mxfp8_experts.w13.dequantize(torch.float64)
    assert torch.equal(dense.dense_experts.w13.double(), exact)
    assert float(exact.std()) == pytest.approx(512**-0.5, rel=0.02)


def test_every_format_has_the_same_biases() -> None:
    weights = LayerWeights(BIASED, 0, CPU)
    source = weights.source
    assert source.gate_up_bias is not None
    assert source.down_bias is not None
    assert not torch.equal(source.gate_up_bias[0], source.gate_up_bias[1])
    for form in (WeightFormat.DENSE, WeightFormat.MXFP8, WeightFormat.BLOCK_FP8):
        made = weights.in_format(form)
        assert torch.equal(made.gate_up_bias, source.gate_up_bias)
        assert torch.equal(made.down_bias, source.down_bias)
    assert LayerWeights(LAYERS["small"], 0, CPU).source.biases == []


def test_a_format_is_made_once_and_alone() -> None:
    weights = LayerWeights(LAYERS["small"], 0, CPU)
    blocks = weights.in_format(WeightFormat.BLOCK_FP8)
    assert list(blocks.kept) == [WeightFormat.BLOCK_FP8]
    assert weights.in_format(WeightFormat.BLOCK_FP8) is blocks
    assert isinstance(weights.source, ExpertWeights)
    assert list(weights.source.kept) == [WeightFormat.MXFP8]


def test_reproducible_from_the_seed() -> None:
    first, again, other = (LayerWeights(ODD, seed, CPU).source.dense_experts for seed in (1, 1, 2))
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first.w13, again.w13)
    assert not torch.equal(first.w13, other.w13)
    assert not torch.equal(first.w13[0], first.w13[1])
