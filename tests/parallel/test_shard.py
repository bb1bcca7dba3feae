from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epfuse import ExpertMap
from epfuse.errors import ShapeError
from epfuse.parallel.shard import held_experts, shard_experts


@st.composite
def maps(draw: st.DrawFn) -> ExpertMap:
    experts = draw(st.integers(1, 24))
    held = draw(st.lists(st.integers(0, experts - 1), unique=True, max_size=experts))
    slots = torch.full((experts,), -1, dtype=torch.int32)
    slots[held] = torch.arange(len(held), dtype=torch.int32)
    return ExpertMap(slots)


@given(maps())
def test_row_of_a_slot_is_its_expert(expert_map: ExpertMap) -> None:
    full = torch.arange(expert_map.num_experts).view(-1, 1, 1).expand(-1, 2, 3)
    shard = shard_experts(full, expert_map)
    assert shard.shape == (expert_map.num_local, 2, 3)
    slots = expert_map.on(torch.device("cpu"))
    for expert, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert (shard[slot] == expert).all()
    assert held_experts(expert_map) == shard[:, 0, 0].tolist()


def test_contiguous_shards_put_together_are_the_whole() -> None:
    full = torch.randn(12, 4, 5)
    shards = [shard_experts(full, ExpertMap.contiguous(12, 4, rank)) for rank in range(4)]
    assert torch.equal(torch.cat(shards), full)


def test_a_shard_shares_no_memory_with_the_whole() -> None:
    full = torch.zeros(4, 2, 2)
    shard_experts(full, ExpertMap.all_local(4)).fill_(1)
    assert not full.any()


def test_meta_in_meta_out() -> None:
    shard = shard_experts(torch.empty(8, 3, 2, device="meta"), ExpertMap.contiguous(8, 2, 1))
    assert shard.is_meta
    assert shard.shape == (4, 3, 2)


@pytest.mark.parametrize("shape", [(), (7, 2, 2)])
def test_refuses_a_tensor_without_all_experts(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="E=8"):
        shard_experts(torch.zeros(shape), ExpertMap.contiguous(8, 2, 0))
