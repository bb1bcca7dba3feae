"""What must hold for any routing and any placement of the experts over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epfuse import ExpertMap, ExpertWeights, fused_experts
from epfuse.stages.route.reference import local_experts, route
from epfuse.stages.route.table import RouteTable

HIDDEN, INTERMEDIATE = 12, 10

# With CI set, hypothesis draws the same examples in every run.
few_examples = settings(deadline=None, max_examples=60)


@dataclass(frozen=True)
class Layer:
    """A routing, and for each expert its rank and slot.

    Attributes:
        ids: ``[T, K]`` int32 or int64; duplicates, -1 and ids outside [0, E) occur.
        maps: one a rank; a rank may hold no expert.
    """

    ids: torch.Tensor
    maps: tuple[ExpertMap, ...]
    experts: int


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    experts = draw(st.integers(1, 9))
    ranks = draw(st.integers(1, 4))
    tokens, top_k = draw(st.integers(1, 9)), draw(st.integers(1, min(experts, 4)))
    wide = draw(st.booleans())
    expert_ids = st.integers(0, experts - 1)
    foreign_ids = st.sampled_from([-1, -1, -2, experts, 2**31 - 1, *([2**32, -(2**33)] if wide else [])])
    routes = st.lists(expert_ids | expert_ids | foreign_ids, min_size=tokens * top_k, max_size=tokens * top_k)
    ids = torch.tensor(draw(routes), dtype=torch.int64 if wide else torch.int32).view(tokens, top_k)
    order = draw(st.permutations(range(experts)))
    owners = draw(st.lists(st.integers(0, ranks - 1), min_size=experts, max_size=experts))
    maps = []
    for rank in range(ranks):
        slots = torch.full((experts,), -1)
        held = [expert for expert in order if owners[expert] == rank]
        slots[held] = torch.arange(len(held))
        maps.append(ExpertMap(slots))
    return Layer(ids, tuple(maps), experts)


def rank_weights(whole: ExpertWeights, expert_map: ExpertMap) -> ExpertWeights:
    slots = expert_map.on(torch.device("cpu"))
    held = torch.argsort(slots)[len(slots) - expert_map.num_local :]
    return ExpertWeights.dense(whole.dense_experts.w13[held], whole.dense_experts.w2[held])


@few_examples
@given(layers(), st.integers(0, 2**20))
def test_sum_over_ranks_is_the_unsharded_layer(layer: Layer, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    whole = ExpertWeights.dense(
        torch.randn(layer.experts, 2 * INTERMEDIATE, HIDDEN, generator=rng),
        torch.randn(layer.experts, HIDDEN, INTERMEDIATE, generator=rng),
    )
    hidden = torch.randn(layer.ids.shape[0], HIDDEN, generator=rng)
    scores = torch.rand(layer.ids.shape, generator=rng)
    parts = [fused_experts(hidden, rank_weights(whole, m), scores, layer.ids, m) for m in layer.maps]
    unsharded = fused_experts(hidden, whole, scores, layer.ids, ExpertMap.all_local(layer.experts))
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), unsharded, rtol=1e-5, atol=1e-4)


@few_examples
@given(layers(), st.sampled_from([1, 2, 16]))
def test_route_table_is_a_padded_permutation_of_the_local_routes(layer: Layer, block_m: int) -> None:
    for expert_map in layer.maps:
        slots = expert_map.on(torch.device("cpu"))
        check_table(route(layer.ids, slots, expert_map.num_local, block_m), local_experts(layer.ids, slots))


def check_table(table: RouteTable, slot_of: torch.Tensor) -> None:
    """``slot_of`` is each route's local expert, or -1."""
    used = int(table.num_padded)
    assert used % table.block_m == 0
    assert used <= table.max_padded == table.max_blocks * table.block_m
    blocks = table.sorted_routes[:used].view(-1, table.block_m)
    experts = table.block_expert[: len(blocks)]
    assert experts.tolist() == sorted(experts.tolist())
    real = blocks < table.num_routes
    assert (blocks[~real] == table.num_routes).all()
    placed = blocks[real].long()
    assert sorted(placed.tolist()) == (slot_of >= 0).nonzero().flatten().tolist()
    assert torch.equal(slot_of[placed], experts.long()[:, None].expand_as(blocks)[real])
    for expert in experts.unique():
        group = blocks[experts == expert].flatten()
        routes = group[group < table.num_routes].tolist()
        assert routes == sorted(routes)  # ascending, the padding last: the result is the same in every run
        assert group[: len(routes)].tolist() == routes
        assert 0 <= len(group) - len(routes) < table.block_m


def test_no_local_route_means_nothing_to_do() -> None:
    table = route(torch.tensor([[2, -1], [3, 9]]), torch.tensor([0, 1, -1, -1], dtype=torch.int32), 2, 16)
    assert int(table.num_padded) == 0
    assert (table.block_expert == -1).all()
