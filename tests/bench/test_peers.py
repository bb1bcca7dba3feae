from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from epfuse.bench.contender import ContenderKind
from epfuse.bench.inputs import draw_inputs
from epfuse.bench.layers import Layer
from epfuse.bench.peers import find, flashinfer_experts
from epfuse.bench.peers.find import PEERS, describe, find_peers
from epfuse.bench.peers.flashinfer_experts import fastest
from epfuse.bench.routing import Routing
from epfuse.bench.weights import LayerWeights
from epfuse.cli.bench import PEER_NAMES
from epfuse.config import LayerShape, SwiGLUOAI, silu_gate
from epfuse.errors import ConfigError
from epfuse.verify.budget import compare
from epfuse.verify.suite import poisoned_memory

CPU = torch.device("cpu")
SHARDED = Layer("", LayerShape(128, 64, 16, 4, 4), SwiGLUOAI())
ALL_LOCAL = Layer("", LayerShape(128, 64, 8, 8, 2), silu_gate())


def test_the_command_offers_every_peer() -> None:
    assert set(PEER_NAMES) == set(PEERS)


@pytest.mark.parametrize("layer", [SHARDED, ALL_LOCAL], ids=["sharded swiglu", "all local silu"])
@pytest.mark.parametrize("routing", ["uniform", "all-to:1", "all-to:3"])
def test_peers_compute_the_same_layer(layer: Layer, routing: str) -> None:
    pytest.importorskip("transformers")
    weights = LayerWeights(layer, 0, CPU)
    peers, absent = find_peers(["transformers", "torch"], weights)
    assert [peer.name for peer in peers] == ["transformers eager", "transformers grouped_mm", "torch grouped_mm"]
    assert absent == []
    for tokens in (1, 37):
        for inputs in draw_inputs(layer, Routing.parse(routing), tokens, 0, CPU, 0)[:2]:
            for peer in peers:
                difference = compare(peer.bind(inputs)(), weights.oracle(inputs))
                assert difference.within(peer.tolerance), (peer.name, tokens, difference)
                assert peer.kind is ContenderKind.PEER


def test_the_tolerance_of_peers_finds_a_missing_clamp_and_a_missing_route() -> None:
    weights = LayerWeights(SHARDED, 0, CPU)
    (peer,), _ = find_peers(["torch"], weights)
    inputs = draw_inputs(SHARDED, Routing.parse("uniform"), 64, 0, CPU, 0)[0]
    oracle = weights.oracle(inputs)
    unclamped = LayerWeights(replace(SHARDED, activation=SwiGLUOAI(limit=1e9)), 0, CPU)
    (other,), _ = find_peers(["torch"], unclamped)
    assert not compare(other.bind(inputs)(), oracle).within(peer.tolerance)
    result = peer.bind(inputs)()
    result[int(oracle.norm(dim=1).argmax())] = 0
    assert not compare(result, oracle).within(peer.tolerance)


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "find_spec", lambda package: None)
    said: list[str] = []
    found, absent = find_peers(["vllm", "torch"], LayerWeights(SHARDED, 0, CPU), said.append)
    assert found == []
    assert [(peer.name, peer.reason) for peer in absent] == [
        ("vllm", "the package vllm is not installed"),
        ("torch", "the package torch is not installed"),
    ]
    assert said == ["vllm", "torch"]


def test_vllm_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "find_spec", lambda package: object())
    found, absent = find_peers(["vllm"], LayerWeights(SHARDED, 0, CPU))
    assert found == []
    assert {peer.name for peer in absent} == {"vLLM TritonExperts", "vLLM Marlin"}
    assert {peer.reason for peer in absent} == {"vLLM's expert kernels need a GPU"}


def test_a_transformers_without_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "find_spec", lambda package: object())
    monkeypatch.setitem(sys.modules, "transformers.models.minimax_m3_vl.configuration_minimax_m3_vl", None)
    found, absent = find_peers(["transformers"], LayerWeights(SHARDED, 0, CPU))
    assert found == []
    assert {peer.reason for peer in absent} == {
        "this transformers has no MiniMax-M3 (5.23 has): pip install 'epfuse[demo]'"
    }


def test_an_activation_that_transformers_lacks() -> None:
    pytest.importorskip("transformers")
    found, absent = find_peers(["transformers"], LayerWeights(replace(SHARDED, activation=SwiGLUOAI(1, 2, 3)), 0, CPU))
    assert found == []
    assert "no experts of transformers have the activation" in absent[0].reason


def test_descriptions() -> None:
    assert describe(ConfigError("size is 3")) == "size is 3"
    assert describe(ValueError("one\ntwo")) == "ValueError: one"
    assert describe(AssertionError()) == "AssertionError"


def grouped_product(a, b, out: torch.Tensor, groups: torch.Tensor) -> None:
    """What DeepGEMM's contiguous layout asks for and computes: blocks of 128 rows of one group each, or of none."""
    (rows, scales), (weights, blocks) = a, b
    assert scales.stride() == (1, rows.shape[0])
    assert rows.shape[0] % 128 == 0
    for first in range(0, rows.shape[0], 128):
        at = slice(first, first + 128)
        owners = set(groups[at].tolist())
        assert len(owners) == 1
        owner = owners.pop()
        if owner >= 0:
            wide = scales[at].repeat_interleave(128, 1)
            block = blocks[owner].repeat_interleave(128, 0).repeat_interleave(128, 1)
            out[at] = ((rows[at].float() * wide) @ (weights[owner].float() * block).T).to(out.dtype)


@pytest.mark.parametrize("routing", ["uniform", "all-to:1"])
def test_deep_gemm_computes_the_same_layer(routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its product: what lies around that is ours."""
    pytest.importorskip("triton")
    monkeypatch.setattr(find, "find_spec", lambda package: object())
    stand_in = SimpleNamespace(m_grouped_fp8_gemm_nt_contiguous=grouped_product)
    monkeypatch.setitem(sys.modules, "deep_gemm", stand_in)
    layer = Layer("", LayerShape(256, 128, 8, 2, 2), SwiGLUOAI())
    weights = LayerWeights(layer, 0, CPU)
    (peer,), absent = find_peers(["deepgemm"], weights)
    assert absent == []
    inputs = draw_inputs(layer, Routing.parse(routing), 9, 0, CPU, 0)[0]
    oracle = weights.oracle(inputs)
    result = peer.bind(inputs)()
    assert compare(result, oracle).within(peer.tolerance)
    result[int(oracle.norm(dim=1).argmax())] = 0
    assert not compare(result, oracle).within(peer.tolerance)


GATE_UP_MODULE = "sm90_contiguous_gather_grouped_gemm_act_fusion"
DOWN_MODULE = "sm90_contiguous_grouped_gemm_finalize_fusion"


def blocks_of(owners, limits, routes, blocks, rows: int):
    """(local expert, slots, routes) of each block, as FlashInfer's products read them."""
    for block in range(int(blocks)):
        slots = slice(block * rows, int(limits[block]))
        yield int(owners[block]), slots, routes[slots].long()


def flashinfer_gate_up(
    x, w13, owners, limits, routes, blocks, *, out, topk, permuted_m, tile_shape_mn, swizzle_size, swiglu_alpha,
    swiglu_beta, swiglu_limit,
) -> None:  # fmt: skip
    """By FlashInfer's docstring: 32 rows of up and 32 of gate in turn, rows past a block's limit left as they are."""
    assert swizzle_size == 1
    assert permuted_m == routes.numel() == out.shape[0]
    assert swiglu_limit <= torch.finfo(torch.float32).max
    for expert, slots, block in blocks_of(owners, limits, routes, blocks, tile_shape_mn[0]):
        both = (x[block // topk].float() @ w13[expert].float().T).unflatten(1, (-1, 2, 32))
        up, gate = both[:, :, 0].flatten(1), both[:, :, 1].flatten(1)
        gate, up = gate.clamp(max=swiglu_limit), up.clamp(-swiglu_limit, swiglu_limit)
        out[slots] = (gate * torch.sigmoid(swiglu_alpha * gate) * (up + swiglu_beta)).to(out.dtype)


def flashinfer_down(
    y, w2, owners, limits, routes, blocks, scales, out, *, topk, tile_shape_mn, cluster_shape_mn
) -> None:  # fmt: skip
    assert cluster_shape_mn == (1, 1)
    for expert, slots, block in blocks_of(owners, limits, routes, blocks, tile_shape_mn[0]):
        rows = (y[slots].float() @ w2[expert].float().T) * scales.flatten()[block, None]
        out.index_add_(0, block // topk, rows.to(out.dtype))


def interleave_up_gate(w13: torch.Tensor) -> torch.Tensor:
    gate, up = (half.unflatten(1, (-1, 32)) for half in w13.chunk(2, dim=1))
    return torch.stack([up, gate], dim=2).flatten(1, 3)


@pytest.mark.parametrize("layer", [SHARDED, ALL_LOCAL], ids=["sharded swiglu", "all local silu"])
@pytest.mark.parametrize("tokens", [1, 77])
def test_flashinfer_computes_the_same_layer(layer: Layer, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for its products: what lies around them is ours."""
    pytest.importorskip("triton")
    monkeypatch.setattr(find, "find_spec", lambda package: object())
    modules = {
        GATE_UP_MODULE: {GATE_UP_MODULE: flashinfer_gate_up, "interleave_up_gate_sm90": interleave_up_gate},
        DOWN_MODULE: {DOWN_MODULE: flashinfer_down},
    }
    for package in ("flashinfer", "flashinfer.fused_moe", "flashinfer.fused_moe.cute_dsl"):
        monkeypatch.setitem(sys.modules, package, SimpleNamespace())
    for name, members in modules.items():
        monkeypatch.setitem(sys.modules, f"flashinfer.fused_moe.cute_dsl.{name}", SimpleNamespace(**members))
    weights = LayerWeights(layer, 0, CPU)
    (peer,), absent = find_peers(["flashinfer"], weights)
    assert absent == []
    inputs = draw_inputs(layer, Routing.parse("uniform"), tokens, 0, CPU, 0)[0]
    oracle = weights.oracle(inputs)
    with poisoned_memory():
        call = peer.bind(inputs)
        call()
        result = call()  # adds nothing to what the first call left
    assert compare(result, oracle).within(peer.tolerance)
    assert peer.block_m(tokens) == 128
    result[int(oracle.norm(dim=1).argmax())] = 0
    assert not compare(result, oracle).within(peer.tolerance)


def test_a_flashinfer_without_these_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "find_spec", lambda package: object())
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace())
    found, absent = find_peers(["flashinfer"], LayerWeights(SHARDED, 0, CPU))
    assert found == []
    assert absent[0].reason.startswith("this FlashInfer has no experts for sm_90 (0.7.4 has)")


def test_the_fastest_tiles_are_taken_and_refused_ones_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each product by itself, in the size of blocks whose sum is least; infinitely slow where all are refused."""
    costs = {64: ((128, 8), (256, (1, 2)), 1.0, 4.0), 128: ((192, 1), (64, (1, 1)), 2.0, 2.0)}
    timed: list[float] = []

    class Grouped:
        def __init__(self, rows: int) -> None:
            self.best_up, self.best_down, self.up_us, self.down_us = costs[rows]

        def route(self) -> None:
            pass

        def gate_up(self, tile: object) -> torch.Tensor:
            if tile == (256, 1):
                raise ValueError("no such tile")
            timed.append(self.up_us if tile == self.best_up else 9.0)
            return torch.empty(0)

        def down(self, tile: object) -> torch.Tensor:
            timed.append(self.down_us if tile == self.best_down else 9.0)
            return torch.empty(0)

    def time_last(calls: list, *_: object) -> SimpleNamespace:
        return SimpleNamespace(timing=SimpleNamespace(median_us=timed[-1]))

    monkeypatch.setattr(flashinfer_experts, "time_calls", time_last)
    sizes = [(rows, cast(Any, Grouped(rows))) for rows in costs]
    assert fastest(sizes, CPU) == (128, (192, 1), (64, (1, 1)))
    costs[64] = ((128, 8), (256, (1, 2)), 1.0, 2.5)
    sizes = [(rows, cast(Any, Grouped(rows))) for rows in costs]
    assert fastest(sizes, CPU) == (64, (128, 8), (256, (1, 2)))


def test_sizes_that_deep_gemm_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "find_spec", lambda package: object())
    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace())
    found, absent = find_peers(["deepgemm"], LayerWeights(SHARDED, 0, CPU))
    assert found == []
    assert absent[0].reason == "H is 128 and I 64; DeepGEMM's block FP8 wants multiples of 128"
