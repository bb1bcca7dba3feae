from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epfuse.errors import ConfigError, DtypeError, ShapeError
from epfuse.expert_map import ExpertMap
from epfuse.parallel.exchange import Dispatch
from epfuse.parallel.group import EPGroup
from epfuse.parallel.placement import ExpertPlacement, PhysicalIds, imbalance, rank_loads
from epfuse.parallel.shard import held_experts

CPU = torch.device("cpu")


@st.composite
def placements(draw: st.DrawFn) -> ExpertPlacement:
    experts, ranks = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    held: list[list[int]] = [[] for _ in range(ranks)]
    for expert in [*range(experts), *draw(st.lists(st.integers(0, experts - 1), max_size=12))]:
        held[draw(st.integers(0, ranks - 1))].append(expert)
    return ExpertPlacement(tuple(map(tuple, held)))


def test_contiguous_is_what_expert_map_has() -> None:
    placement = ExpertPlacement.contiguous(10, 4)
    for rank in range(4):
        ours, theirs = placement.expert_map(rank), ExpertMap.contiguous(10, 4, rank)
        assert torch.equal(ours.on(CPU), theirs.on(CPU))


def test_strided_deals_experts_out_in_turn() -> None:
    assert ExpertPlacement.strided(7, 3).held == ((0, 3, 6), (1, 4), (2, 5))


@given(placements())
@settings(deadline=None)
def test_every_physical_expert_is_on_one_rank(placement: ExpertPlacement) -> None:
    maps = torch.stack([placement.expert_map(rank).on(CPU) for rank in range(placement.ranks)])
    assert ((maps >= 0).sum(0) == 1).all()
    assert torch.equal((maps >= 0).int().argmax(0), placement.owners())
    weights = torch.arange(placement.num_experts)
    for rank in range(placement.ranks):  # a slot's weights are those of the expert that its physical id is a copy of
        shard = placement.shard(weights, rank)
        for expert, ids in enumerate(placement.copies):
            for physical in ids:
                slot = int(maps[rank, physical])
                assert slot < 0 or int(shard[slot]) == expert


@given(placements(), st.integers(0, 40), st.integers(1, 4), st.integers(0, 2**30))
@settings(deadline=None)
def test_each_route_takes_one_copy_and_copies_share_evenly(
    placement: ExpertPlacement, tokens: int, top_k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, placement.num_experts + 1, (tokens, top_k), generator=generator)
    found = PhysicalIds(placement)(ids)
    for given_id, physical in zip(ids.flatten().tolist(), found.flatten().tolist(), strict=True):
        real = 0 <= given_id < placement.num_experts
        assert physical in placement.copies[given_id] if real else physical == -1
    same = PhysicalIds(placement)(torch.zeros(tokens, 1, dtype=torch.int32))
    counts = [int((same == physical).sum()) for physical in placement.copies[0]]
    assert max(counts) - min(counts) <= 1


def test_where_each_expert_is_once_physical_ids_are_the_routers() -> None:
    ids = torch.tensor([[0, 3], [-1, 9], [2**32, 1]])
    wanted = torch.tensor([[0, 3], [-1, -1], [-1, 1]])
    assert torch.equal(PhysicalIds(ExpertPlacement.strided(4, 3))(ids), wanted)


def test_what_is_asked_of_a_placement_is_on_the_cpu_whatever_the_default_device_is() -> None:
    """README's own example sets a GPU as the default; meta stands for it here."""
    placement, group = ExpertPlacement(((0, 2, 0), (1,))), EPGroup(1, 2)
    ids = torch.tensor([[0, 1], [2, 0]])
    with torch.device("meta"):
        expert_map, owners, mode = placement.expert_map(1), placement.owners(), Dispatch(group, placement, 2)
        physical, held = PhysicalIds(placement), held_experts(ExpertMap.contiguous(5, 2, 1))
    assert expert_map.on(CPU).tolist() == [-1, 0, -1, -1]
    assert owners.tolist() == [0, 1, 0, 0]
    assert mode._owners.wanted(ids).tolist() == [[True, True], [True, False]]
    assert physical(ids).tolist() == [[0, 1], [2, 3]]
    assert held == [3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool])
def test_ids_of_another_dtype_are_refused(dtype: torch.dtype) -> None:
    """Floats would be cut down to experts."""
    with pytest.raises(DtypeError, match=f"topk_ids has dtype {dtype}; it must be int32 or int64"):
        PhysicalIds(ExpertPlacement.strided(4, 3))(torch.zeros(2, 2).to(dtype))


def test_load_of_the_ranks() -> None:
    placement = ExpertPlacement(((0, 1), (0, 2)))
    assert rank_loads(placement, [8, 1, 3]) == [5.0, 7.0]
    assert imbalance(placement, [8, 1, 3]) == pytest.approx(7 / 6)
    assert imbalance(placement, [0, 0, 0]) == 1.0


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ((), "held is empty"),
        (((), ()), "held names 0 experts"),
        (((0,), (2,)), "held names 2 experts"),
        (((0,), (-1,)), "an expert of held is -1"),
        (((0.0,),), "an expert of held is 0.0"),
    ],
)
def test_what_is_no_placement_is_refused(held: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ExpertPlacement(held)


def test_wrong_arguments_are_refused() -> None:
    placement = ExpertPlacement.contiguous(4, 2)
    with pytest.raises(ConfigError, match="rank is 2"):
        placement.expert_map(2)
    with pytest.raises(ShapeError, match="full has shape"):
        placement.shard(torch.zeros(3, 2), 0)
    with pytest.raises(ShapeError, match="load has 3 numbers"):
        imbalance(placement, [1, 2, 3])
    with pytest.raises(ConfigError, match="load of expert 1 is -1"):
        imbalance(placement, [1, -1, 2, 3])
    with pytest.raises(ConfigError, match="load of expert 0 is nan"):
        imbalance(placement, [float("nan"), 1, 2, 3])
    for make in (ExpertPlacement.contiguous, ExpertPlacement.strided):
        with pytest.raises(ConfigError, match="ranks is 0"):
            make(4, 0)
