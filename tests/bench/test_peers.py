from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from epfuse.bench.contender import ContenderKind
from epfuse.bench.inputs import draw_inputs
from epfuse.bench.layers import Layer
from epfuse.bench.peers import find
from epfuse.bench.peers.find import PEERS, describe, find_peers
from epfuse.bench.routing import Routing
from epfuse.bench.weights import LayerWeights
from epfuse.cli.bench import PEER_NAMES
from epfuse.config import LayerShape, SwiGLUOAI, silu_gate
from epfuse.errors import ConfigError
from epfuse.verify.budget import compare

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


def test_sizes_that_deep_gemm_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "find_spec", lambda package: object())
    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace())
    found, absent = find_peers(["deepgemm"], LayerWeights(SHARDED, 0, CPU))
    assert found == []
    assert absent[0].reason == "H is 128 and I 64; DeepGEMM's block FP8 wants multiples of 128"
