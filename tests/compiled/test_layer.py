"""One tile, one binary: whatever differs between a layer's calls, Triton tells no more kernels apart than named."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch

from epfuse import api
from epfuse.aot.tasks import start
from epfuse.config import Combine, Path, WeightFormat
from epfuse.expert_map import ExpertMap
from epfuse.families.family import LayerCall, Steps
from epfuse.target import Target
from epfuse.weights.experts import ExpertWeights
from tests.compiled import keys

SIZES = {
    # name: binaries of a layer for up to 3000 tokens. For each choice of tiles one of each GEMM, fewer where choices
    # share one; route has one for each power of two of routes and row block; combine one below 512 tokens and one above
    # where H exceeds 1024; the rest one for each row block
    "sm_90-w8a16-deterministic": {
        "route_kernel": 16,
        "count_kernel": 1,
        "place_kernel": 4,
        "gate_up_sm90_kernel": 6,
        "down_sm90_kernel": 4,  # I is short
        "gather_kernel": 5,
        "gate_up_down_sm90_kernel": 9,
        "combine_kernel": 2,
    },
    "sm_90-bf16-deterministic": {
        "route_kernel": 15,
        "count_kernel": 1,
        "place_kernel": 2,
        "gate_up_sm90_kernel": 5,
        "down_sm90_kernel": 5,
        "gather_kernel": 4,
        "gate_up_down_sm90_dense_kernel": 6,
        "combine_kernel": 2,
    },
    "sm_90-w8a8-deterministic": {
        "route_kernel": 11,
        "count_kernel": 1,
        "place_kernel": 1,
        "quantize_packed_kernel": 8,
        "gate_up_sm90_fp8_kernel": 5,
        "down_sm90_fp8_kernel": 5,
        "combine_kernel": 1,
    },
    "sm_90-w8a8-whole-pairs": {
        "route_kernel": 12,
        "count_kernel": 1,
        "place_kernel": 1,
        "quantize_packed_kernel": 11,
        "gate_up_sm90_fp8_kernel": 5,
        "down_sm90_fp8_kernel": 5,
        "gate_up_down_sm90_fp8_rows_kernel": 3,  # both GEMMs at once; each alone without a bound
        "combine_kernel": 1,
    },
    "sm_90-block_fp8-deterministic": {
        "route_kernel": 11,
        "count_kernel": 1,
        "place_kernel": 1,
        "quantize_packed_kernel": 4,
        "gate_up_sm90_block_fp8_kernel": 4,
        "down_sm90_block_fp8_kernel": 4,
        "combine_kernel": 1,
    },
    "sm_90-block_fp8-atomic": {
        "route_kernel": 11,
        "count_kernel": 1,
        "place_kernel": 1,
        "quantize_kernel": 1,
        "gate_up_fp8_kernel": 4,
        "activate_kernel": 1,
        "down_fp8_kernel": 4,
    },
    "gfx942-w8a16-deterministic": {
        "route_kernel": 10,
        "count_kernel": 1,
        "place_kernel": 1,
        "gate_up_kernel": 3,
        "down_kernel": 3,
        "combine_kernel": 1,
    },
    "gfx942-bf16-deterministic": {
        "route_kernel": 10,
        "count_kernel": 1,
        "place_kernel": 1,
        "gate_up_kernel": 3,
        "down_kernel": 3,
        "combine_kernel": 1,
    },
    "gfx942-w8a8-atomic": {
        "route_kernel": 10,
        "count_kernel": 1,
        "place_kernel": 1,
        "quantize_kernel": 1,
        "gate_up_fp8_kernel": 3,
        "activate_kernel": 1,
        "down_fp8_kernel": 3,
    },
    "gfx942-w8a8-deterministic": {
        "route_kernel": 10,
        "count_kernel": 1,
        "place_kernel": 1,
        "quantize_kernel": 1,
        "gate_up_fp8_kernel": 3,
        "activate_kernel": 1,
        "down_fp8_kernel": 3,
        "combine_kernel": 1,
    },
}
SIZES |= {keys.with_biases(name): counts for name, counts in SIZES.items() if keys.with_biases(name) in keys.LAYERS}


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """A process that doesn't interpret."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start) as made:
        yield made


@pytest.mark.parametrize("name", keys.LAYERS)
def test_calls_launch_what_the_layer_names(pool: ProcessPoolExecutor, name: str) -> None:
    """T, offsets of all operands, workspaces that out lies in or not, activations in integers."""
    strangers, several, counts = pool.submit(keys.compare, name, seed=20, count=20).result()
    assert strangers == []
    assert several == []  # constants have one key
    assert counts == SIZES[name]


@pytest.mark.parametrize("top_k", [1, 2, 8, 16])
@pytest.mark.parametrize("name", keys.LAYERS)
def test_whatever_k_is_calls_launch_what_the_layer_names(pool: ProcessPoolExecutor, name: str, top_k: int) -> None:
    """Of an integer that is 1 or divisible by 16 Triton would know more."""
    strangers, several, counts = pool.submit(keys.compare, name, seed=top_k, count=12, top_k=top_k).result()
    assert strangers == []
    assert several == []
    assert counts["route_kernel"] >= 10


def test_large_tensors_have_keys_of_their_own_on_amd_alone(pool: ProcessPoolExecutor) -> None:
    """Of MiniMax-M3 with 131072 tokens, where rows take more than 2 GiB: known from T, whatever the storage."""
    hopper, amd = pool.submit(keys.of_large_calls).result()
    assert hopper == {"gate_up_kernel": 1, "down_kernel": 1, "combine_kernel": 1}
    assert amd == {"gate_up_kernel": 2, "down_kernel": 3, "combine_kernel": 2}  # of down out is larger, then y too


@pytest.mark.parametrize(
    ("target", "max_tokens", "chunks"),
    [
        (Target.SM90, 12287, {128}),
        (Target.SM90, 12288, {128, 256}),
        (Target.SM90, 40000, {128, 256, 512}),
        (Target.GFX942, 40000, {128}),
    ],
)
def test_each_length_of_a_chunk_of_routes_is_named(
    pool: ProcessPoolExecutor, target: Target, max_tokens: int, chunks: set[int]
) -> None:
    """4 experts a token: a chunk is longer from 12288 and from 32768 tokens on."""
    named = pool.submit(keys.chunks_of, target, max_tokens).result()
    assert named == {"count_kernel": chunks, "place_kernel": chunks}


def test_a_kernels_key_is_the_same_whatever_was_looked_for_before(pool: ProcessPoolExecutor) -> None:
    """Triton's own is not: each process that compiles would file kernels where others don't look."""
    forward, backward, alone = pool.submit(keys.by_order).result()
    assert len(forward) > 15
    assert forward == backward == alone


def _shifted(tensor: torch.Tensor, elements: int = 1) -> torch.Tensor:
    """The same numbers, at an address that is no multiple of 16 bytes."""
    memory = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)
    found = memory[elements : elements + tensor.numel()].view(tensor.shape).copy_(tensor)
    assert found.data_ptr() % 16
    return found


def test_operands_that_begin_anywhere_are_brought_to_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LayerCall] = []

    def steps(call: LayerCall, tiles: object) -> Steps:
        seen.append(call)
        return Steps(call.table(16), (("all", lambda: call.out.copy_(2 * call.hidden)),))

    decision = SimpleNamespace(family=SimpleNamespace(steps=steps), weights=WeightFormat.DENSE, tiles=object())
    monkeypatch.setattr(api, "table_of", lambda *arguments: SimpleNamespace(at=lambda tokens: decision))
    hidden, ids = torch.randn(5, 64).bfloat16(), torch.zeros(5, 3, dtype=torch.int32)
    weights = ExpertWeights.bf16(torch.zeros(2, 64, 64).bfloat16(), torch.zeros(2, 64, 32).bfloat16())
    for combine in Combine:
        out = _shifted(torch.zeros_like(hidden))
        got = api.fused_experts(
            _shifted(hidden),
            weights,
            _shifted(torch.rand(5, 3)),
            _shifted(ids),
            ExpertMap.all_local(2),
            path=Path.BF16,
            combine=combine,
            out=out,
        )
        assert got is out
        assert torch.equal(out, 2 * hidden)
    for call in seen:
        assert all(value.data_ptr() % 16 == 0 for value in call if isinstance(value, torch.Tensor))
