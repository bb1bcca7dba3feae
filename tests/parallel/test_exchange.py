"""Tokens on other ranks: whatever the mode, the placement and the routing, the sum is the unsharded layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epfuse import ExpertWeights
from epfuse import Path as LayerPath
from epfuse.errors import ConfigError, DtypeError, LayoutError, ShapeError
from epfuse.parallel.exchange import AllGather, CompactDispatch, Dispatch, Exchange, Replicated, SequenceParallel
from epfuse.parallel.group import EPGroup, SumIn
from epfuse.parallel.launch import Placement, launch_ranks
from epfuse.parallel.payload import AS_GIVEN, FP8, pack, payload_for, unpack
from epfuse.parallel.placement import ExpertPlacement
from epfuse.stages.quantize.reference import quantize
from tests.parallel.exchange_entries import every_mode, many_calls


@pytest.mark.parametrize(("ranks", "examples"), [(2, 16), (4, 8), (8, 3)])
def test_every_mode_is_the_unsharded_layer(tmp_path: Path, ranks: int, examples: int) -> None:
    calls = launch_ranks(
        every_mode,
        (examples,),
        ranks=ranks,
        placement=Placement.CPU,
        log_dir=tmp_path,
        preload=("tests.parallel.exchange_entries",),
    )
    assert calls == [examples] * ranks


def test_a_thousand_calls_leave_nothing_behind(tmp_path: Path) -> None:
    for grown in launch_ranks(many_calls, (1000,), ranks=2, placement=Placement.CPU, log_dir=tmp_path):
        assert grown.pop("kilobytes") < 4096
        assert grown == {"files": 0, "threads": 0, "tensors": 0}


def experts(hidden: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
    return hidden * topk_weights.sum(1, keepdim=True)


def one_rank_modes() -> list[Exchange]:
    group, placement = EPGroup.single(), ExpertPlacement.contiguous(4, 1)
    return [
        Replicated(group),
        SequenceParallel(group),
        AllGather(group, 3),
        Dispatch(group, placement, 3),
        CompactDispatch(group, placement, 3, 1),
    ]


@pytest.mark.parametrize("mode", one_rank_modes(), ids=lambda mode: type(mode).__name__)
def test_one_rank_needs_no_torch_distributed(mode: Exchange) -> None:
    hidden, weights, ids = torch.randn(3, 8), torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    assert torch.equal(mode(hidden, weights, ids, experts), experts(hidden, weights, ids))
    with_more = mode(hidden, weights, ids, experts, lambda: torch.ones(3, 8))
    assert torch.equal(with_more, experts(hidden, weights, ids) + 1)
    with pytest.raises(ShapeError, match="topk_weights has shape"):
        mode(hidden, weights[:, :1], ids, experts)
    with pytest.raises(ShapeError, match="hidden has shape"):
        mode(hidden[:2], weights, ids, experts)
    with pytest.raises(DtypeError, match="topk_weights has dtype"):
        mode(hidden, weights.double(), ids, experts)
    for dtype in (torch.float32, torch.uint8, torch.bool):
        with pytest.raises(DtypeError, match=f"topk_ids has dtype {dtype}; it must be int32 or int64"):
            mode(hidden, weights, ids.to(dtype), experts)
    with pytest.raises(LayoutError, match=r"hidden has strides \(1, 3\)"):
        mode(torch.randn(8, 3).T, weights, ids, experts)


@pytest.mark.parametrize("mode", one_rank_modes(), ids=lambda mode: type(mode).__name__)
def test_what_callables_return_must_fit(mode: Exchange) -> None:
    """torch would add one row to all rows, and widen a dtype; with NCCL other bytes would be sent than are awaited."""
    hidden, weights, ids = torch.randn(3, 8), torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"experts returned shape \(1, 8\); it must be \(3, 8\)"):
        mode(hidden, weights, ids, lambda x, *routes: x[:1])
    with pytest.raises(DtypeError, match=r"experts returned dtype torch\.bfloat16"):
        mode(hidden, weights, ids, lambda x, *routes: x.bfloat16())
    with pytest.raises(ShapeError, match=r"overlap returned shape \(1, 8\)"):
        mode(hidden, weights, ids, experts, lambda: torch.ones(1, 8))
    with pytest.raises(DtypeError, match=r"overlap returned dtype torch\.float64"):
        mode(hidden, weights, ids, experts, lambda: torch.ones(3, 8, dtype=torch.float64))


def test_the_facts_of_a_mode_are_what_ranks_must_share() -> None:
    group, placement = EPGroup(1, 2), ExpertPlacement.contiguous(4, 2)
    facts = CompactDispatch(group, placement, 4, 2, FP8(32)).facts(torch.bfloat16, 2)
    assert facts == {
        "exchange": "CompactDispatch",
        "activations": "torch.bfloat16",
        "K": "2",
        "room": "4",
        "capacity": "2",
        "payload": "FP8(group=32)",
    }
    for other in (
        CompactDispatch(group, placement, 5, 2, FP8(32)).facts(torch.bfloat16, 2),
        CompactDispatch(group, placement, 4, 1, FP8(32)).facts(torch.bfloat16, 2),
        CompactDispatch(group, placement, 4, 2).facts(torch.bfloat16, 2),
        CompactDispatch(group, placement, 4, 2, FP8(32)).facts(torch.float16, 2),
        CompactDispatch(group, placement, 4, 2, FP8(32)).facts(torch.bfloat16, 3),
        Dispatch(group, placement, 4, FP8(32)).facts(torch.bfloat16, 2),
    ):
        assert other != facts
    assert CompactDispatch(EPGroup(0, 2), placement, 4, 2, FP8(32)).facts(torch.bfloat16, 2) == facts
    sums = [Replicated(group, sum_in).facts(torch.bfloat16, 2) for sum_in in SumIn]
    assert sums[0] != sums[1]


def test_more_tokens_than_room_are_refused() -> None:
    group, placement = EPGroup(0, 2), ExpertPlacement.contiguous(4, 2)
    for mode in (AllGather(group, 2), Dispatch(group, placement, 2), CompactDispatch(group, placement, 2, 1)):
        with pytest.raises(ShapeError, match="hidden has 3 tokens; room is 2"):
            mode(torch.randn(3, 8), torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int64), experts)


def test_sizes_that_make_no_sense_are_refused() -> None:
    group, placement = EPGroup(0, 2), ExpertPlacement.contiguous(4, 2)
    with pytest.raises(ConfigError, match="room is 0"):
        AllGather(group, 0)
    with pytest.raises(ConfigError, match="capacity is 5"):
        CompactDispatch(group, placement, 4, 5)
    with pytest.raises(ConfigError, match="placement is one of 3 ranks; the group has 2"):
        Dispatch(group, ExpertPlacement.contiguous(4, 3), 4)


@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=96),
    st.sampled_from([16, 32, 128, 256]),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
@settings(deadline=None)
def test_what_arrives_in_fp8_is_quantised_to_itself(values: list[float], group: int, dtype: torch.dtype) -> None:
    """So a path that quantises in the same groups computes with the numbers that it would have had."""
    hidden = torch.tensor([values]).to(dtype)
    hidden[hidden.abs() < 1e-30] = 0.0  # bfloat16 has no more steps there
    payload = FP8(group)
    data = payload.encode(hidden)
    assert data.shape == (1, payload.nbytes(len(values), dtype))
    arrived = payload.decode(data, len(values), dtype)
    ours, theirs = quantize(hidden, group).dequantize(), quantize(arrived, group).dequantize()
    assert torch.equal(ours, theirs)
    assert torch.equal(arrived.float(), ours)


@given(
    st.integers(0, 5),
    st.integers(1, 3),
    st.integers(1, 7),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sampled_from([torch.int32, torch.int64]),
)
@settings(deadline=None)
def test_rows_survive_packing_bit_for_bit(
    tokens: int, top_k: int, hidden: int, dtype: torch.dtype, ids_dtype: torch.dtype
) -> None:
    rows, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, top_k)
    weights[:1] = torch.nan
    ids = torch.tensor([0, -1, 2**32, 2**31 - 1, -7])[torch.randint(5, (tokens, top_k))].to(ids_dtype)
    data = pack(rows, weights, ids, AS_GIVEN)
    assert data.shape == (tokens, 8 * top_k + AS_GIVEN.nbytes(hidden, dtype))
    found = unpack(data, top_k, hidden, dtype, AS_GIVEN)
    assert torch.equal(found.hidden, rows)
    assert torch.equal(found.topk_weights.view(torch.int32), weights.view(torch.int32))
    assert torch.equal(found.topk_ids.long(), torch.where((ids.long() >= 0) & (ids.long() < 2**31), ids.long(), -1))


def test_the_payload_of_a_path() -> None:
    dense = ExpertWeights.dense(torch.zeros(1, 128, 128), torch.zeros(1, 128, 64))
    packed = ExpertWeights.quantize(dense)
    assert payload_for(LayerPath.BF16, dense) == AS_GIVEN
    assert payload_for(LayerPath.W8A16, packed) == AS_GIVEN
    assert payload_for(LayerPath.W8A8, packed) == FP8(32)
    assert payload_for(LayerPath.BLOCK_FP8, packed) == FP8(128)
