from __future__ import annotations

import os

import pytest
import torch

from epfuse.bench.inputs import MOST_VARIANTS, Inputs, cache_bytes_of, draw_inputs, rotated_bytes
from epfuse.bench.layers import LAYERS, Layer
from epfuse.bench.roofline import MatrixOperand
from epfuse.bench.routing import Routing
from epfuse.config import LayerShape, SwiGLUOAI, WeightFormat

CPU = torch.device("cpu")
SMALL = LAYERS["small"]
RARE = Layer("one expert of 64", LayerShape(64, 32, 64, 1, 1), SwiGLUOAI())


def draw(layer: Layer, text: str, tokens: int, cache: int = 0, seed: int = 0) -> list[Inputs]:
    return draw_inputs(layer, Routing.parse(text), tokens, seed, CPU, cache)


def test_rows_and_active_experts_are_those_of_the_ids() -> None:
    for inputs in draw(SMALL, "uniform", 3):
        local = inputs.topk_ids[inputs.topk_ids < 4]
        assert inputs.rows == local.numel()
        assert inputs.active == tuple(sorted(set(local.tolist())))
        assert (inputs.hidden.dtype, inputs.topk_ids.dtype) == (torch.bfloat16, torch.int32)
        assert inputs.topk_weights.sum(dim=1).tolist() == pytest.approx([1.0] * 3)


def test_a_draw_without_a_local_route_is_drawn_again() -> None:
    assert all(inputs.rows == 1 for inputs in draw(RARE, "uniform", 1))


def test_reproducible_from_the_seed() -> None:
    first, again, other = (draw(SMALL, "uniform", 5, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first.hidden, again.hidden)
    assert torch.equal(first.topk_ids, again.topk_ids)
    assert not torch.equal(first.hidden, other.hidden)


def test_few_routes_are_drawn_more_often() -> None:
    assert [len(draw(SMALL, "uniform", tokens)) for tokens in (1, 16, 32, 300)] == [8, 8, 4, 2]


def test_calls_in_turn_read_more_than_the_cache_holds() -> None:
    layer = LAYERS["minimax-m3-tp8"]
    thin = Layer("", LayerShape(64, layer.shape.intermediate, 128, 128, 4), SwiGLUOAI())
    one_expert = thin.expert_weights
    drawn = draw(thin, "all-to:2", 256, cache=7 * one_expert)
    assert len(drawn) == 11  # 22 experts are the first that exceed three caches of 7
    assert rotated_bytes(drawn, thin, WeightFormat.MXFP8) == 22 * one_expert * 33 / 32


def test_draws_end_when_there_is_nothing_else_to_read() -> None:
    assert len(draw(SMALL, "uniform", 300, cache=1 << 40)) == 2
    assert len(draw(SMALL, "all-to:1", 300, cache=1 << 40)) == 4  # four local experts
    assert len(draw(LAYERS["minimax-m3-tp8"], "all-to:1", 1, cache=1 << 40)) == MOST_VARIANTS


def test_work_counts_active_weights_and_useful_rows() -> None:
    inputs = draw(SMALL, "all-to:2", 10)[0]
    work = inputs.work(SMALL, WeightFormat.DENSE, MatrixOperand.BF16)
    assert work.weight_bytes == 2 * 2 * 3 * 512 * 256
    assert work.flops == 2 * 20 * 3 * 512 * 256


def test_cache_of_a_cpu_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_bytes_of(CPU) >= 0

    def unknown(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(os, "sysconf", unknown)
    assert cache_bytes_of(CPU) == 0
