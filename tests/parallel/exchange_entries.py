"""What ranks do in the tests of exchanges: module-level, so that another process finds it."""

from __future__ import annotations

import gc
import os
import resource
import time
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from epfuse import ExpertWeights, SwiGLUOAI, fused_experts
from epfuse.parallel.exchange import AllGather, CompactDispatch, Dispatch, Exchange, Replicated, SequenceParallel
from epfuse.parallel.group import EPGroup, SumIn
from epfuse.parallel.launch import RankContext
from epfuse.parallel.payload import AS_GIVEN, FP8
from epfuse.parallel.placement import ExpertPlacement, PhysicalIds
from epfuse.verify.oracle import add_experts
from epfuse.verify.scenarios import Scenario

H, I = 32, 16  # noqa: E741 - sizes have the letters of DESIGN.md
FOREIGN = (-1, -7, 2**31 - 1, 2**32)
"""Ids that are no expert; the last one wraps to 0 in 32 bits."""
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Draw:
    """One call over all ranks."""

    placement: ExpertPlacement
    tokens: tuple[int, ...]  # by rank
    topk_ids: torch.Tensor  # of all ranks' tokens, one after another
    capacity: int
    dtype: torch.dtype
    seed: int


@st.composite
def draws(draw: st.DrawFn, ranks: int) -> Draw:
    experts = draw(st.integers(max(1, ranks - 2), 2 * ranks + 1))
    kind = draw(st.sampled_from(["contiguous", "strided", "any"]))
    if kind == "any":  # uneven, with copies; a rank may hold nothing, or an expert twice
        held: list[list[int]] = [[] for _ in range(ranks)]
        extra = draw(st.lists(st.integers(0, experts - 1), max_size=ranks))
        for expert in [*range(experts), *extra]:
            held[draw(st.integers(0, ranks - 1))].append(expert)
        placement = ExpertPlacement(tuple(map(tuple, held)))
    else:
        placement = getattr(ExpertPlacement, kind)(experts, ranks)
    tokens = tuple(draw(st.lists(st.integers(0, 6), min_size=ranks, max_size=ranks)))
    top_k = draw(st.integers(1, 4))
    ids = st.one_of(st.integers(0, experts - 1), st.sampled_from([*FOREIGN, experts]))
    if draw(st.booleans()):  # all to few experts
        ids = st.sampled_from(draw(st.lists(st.integers(0, experts - 1), min_size=1, max_size=2)))
    routes = draw(st.lists(ids, min_size=sum(tokens) * top_k, max_size=sum(tokens) * top_k))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    room = max(1, *tokens)
    topk_ids = torch.tensor(routes, dtype=torch.int64).view(-1, top_k)
    return Draw(placement, tokens, topk_ids, draw(st.integers(1, room)), dtype, draw(st.integers(0, 2**20)))


def every_mode(context: RankContext, examples: int) -> int:
    """Hypothesis in every rank, drawing alike; ranks that find something tell the others. Returns the calls made."""
    group, calls = context.group, 0

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )
    @given(draws(group.size))
    def check(drawn: Draw) -> None:
        nonlocal calls
        found = wrong_modes(group, drawn)
        calls += 1
        first = group.size - group.largest(torch.tensor(group.size - group.rank if found else 0))
        if first < group.size:  # all of them, or ranks would go on with different examples
            raise AssertionError("; ".join(found) if group.rank == first else f"rank {first} has found something")

    check()
    return calls


def wrong_modes(group: EPGroup, drawn: Draw) -> list[str]:
    """The modes whose result differs from the unsharded layer's by more than it may, in this rank's rows."""
    placement, ids = drawn.placement, drawn.topk_ids
    generator = torch.Generator().manual_seed(drawn.seed)
    w13 = (torch.randn(placement.num_experts, 2 * I, H, generator=generator) / H**0.5).to(drawn.dtype)
    w2 = (torch.randn(placement.num_experts, H, I, generator=generator) / I**0.5).to(drawn.dtype)
    hidden = torch.randn(len(ids), H, generator=generator).to(drawn.dtype)
    weights = torch.rand(ids.shape, generator=generator)
    fp8, sum_in = FP8(16), list(SumIn)[drawn.seed % 2]
    oracles = {}
    for payload in (AS_GIVEN, fp8):  # what is rounded on its way is another input
        arrives = payload.decode(payload.encode(hidden), H, drawn.dtype)
        oracles[payload] = torch.zeros(hidden.shape, dtype=torch.float64)
        add_experts(oracles[payload], 0, w13, w2, Scenario("", arrives, weights, ids), SwiGLUOAI())

    held = ExpertWeights.dense(placement.shard(w13, group.rank), placement.shard(w2, group.rank))
    expert_map, physical = placement.expert_map(group.rank), PhysicalIds(placement)
    translated = drawn.seed % 3 > 0  # physical ids are made, or the router's own, which are first copies, will do

    def experts(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        return fused_experts(x, held, topk_weights, topk_ids, expert_map)

    room = max(1, *drawn.tokens)
    first = sum(drawn.tokens[: group.rank])
    own = slice(first, first + drawn.tokens[group.rank])
    every = SequenceParallel(group).rows_of(len(ids))
    all_rows, some_rows = slice(0, len(ids)), slice(every.start, every.stop)
    modes: list[tuple[Exchange, slice, slice]] = [
        (Replicated(group, sum_in), all_rows, all_rows),
        (SequenceParallel(group, sum_in), all_rows, some_rows),
        (AllGather(group, room, sum_in), own, own),
        (AllGather(group, room, sum_in, fp8), own, own),
        (Dispatch(group, placement, room), own, own),
        (Dispatch(group, placement, room + 3, fp8), own, own),
        (CompactDispatch(group, placement, room, drawn.capacity), own, own),
    ]
    wrong = []
    for index, (mode, passed, got) in enumerate(modes):
        expected = oracles[getattr(mode, "payload", AS_GIVEN)][got]
        beside = torch.full(expected.shape, 0.5, dtype=drawn.dtype)
        overlap = [None, lambda beside=beside: beside][(drawn.seed + index) % 2]
        routes = physical(ids[passed]) if translated else ids[passed].contiguous()
        if index % 2 and not bool((routes >= 2**31).any()):
            routes = routes.int()
        result = mode(hidden[passed], weights[passed], routes, experts, overlap)
        wanted = expected + (0.5 if overlap else 0.0)
        error = (result.double() - wanted).norm(dim=1) / (1.0 + wanted.norm(dim=1))
        if result.shape != wanted.shape or result.dtype != drawn.dtype or bool((error > LIMITS[drawn.dtype]).any()):
            wrong.append(f"rank {group.rank} {mode}: {error.tolist()} in {drawn}")
    return wrong


def many_calls(context: RankContext, calls: int) -> dict[str, Any]:
    """The same few calls again and again: open files, threads, tensors and memory before and after."""
    group = context.group
    placement = ExpertPlacement.strided(4, group.size)
    ids = torch.arange(6).view(3, 2) % 4
    hidden, weights = torch.ones(3, H), torch.ones(3, 2)
    modes: list[Exchange] = [
        Replicated(group),
        SequenceParallel(group),
        AllGather(group, 4),
        Dispatch(group, placement, 4),
        CompactDispatch(group, placement, 4, 1),
    ]

    def round_of_calls() -> None:
        for mode in modes:
            rows = len(SequenceParallel(group).rows_of(3)) if isinstance(mode, SequenceParallel) else 3
            mode(hidden, weights, ids, lambda x, topk_weights, topk_ids: x * 2, lambda rows=rows: torch.zeros(rows, H))

    def open_files() -> int:
        time.sleep(0.02)
        return len(os.listdir("/proc/self/fd"))

    def state() -> dict[str, Any]:
        gc.collect()
        return {
            "files": min(open_files() for _ in range(10)),  # other threads open one for a moment
            "threads": len(os.listdir("/proc/self/task")),
            "tensors": sum(isinstance(found, torch.Tensor) for found in gc.get_objects()),
            "kilobytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }

    for _ in range(20):
        round_of_calls()
    before = state()
    for _ in range(calls // len(modes)):
        round_of_calls()
    after = state()
    return {name: after[name] - before[name] for name in before}
