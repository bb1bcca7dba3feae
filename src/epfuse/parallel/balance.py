"""A placement made for a measured load: busy experts apart from each other, and copies of the busiest."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from epfuse.arguments import integer
from epfuse.errors import ConfigError
from epfuse.parallel.placement import ExpertPlacement, check_load, imbalance

MOST_SWAPS = 10_000
"""Of two slots' experts; each makes the busiest rank less busy."""


def balanced(load: Sequence[float], ranks: int, redundant: int = 0) -> ExpertPlacement:
    """Place the experts so that the busiest rank has little more than the mean.

    Redundant slots go one by one to the expert whose copies have most to do. Then the copies are placed, the busiest
    first, each on the least busy rank that has a slot left and preferably not the same expert; and slots are swapped as
    long as that helps the busiest rank. Without redundant slots the result is never worse than contiguous or strided.

    Args:
        load: ``[E]``, how often each expert was chosen: routes, tokens or any other count.
        ranks: P.
        redundant: slots beyond one for each expert; every rank has (E + redundant) / P slots, the first ones one more.

    Raises:
        ConfigError: a number is out of range: every expert can have P copies at the most.
        ShapeError: load is empty.
    """
    ranks = integer("ranks", ranks, least=1)
    experts = len(load)
    check_load(load, max(1, experts))
    redundant = integer("redundant", redundant)
    if redundant > experts * (ranks - 1):
        raise ConfigError(
            f"redundant is {redundant}; {experts} experts on {ranks} ranks can have {experts * (ranks - 1)} more copies"
        )
    counts = _copies(load, ranks, redundant)
    each = [load[expert] / counts[expert] for expert in range(experts)]
    slots = experts + redundant
    room = [slots // ranks + (rank < slots % ranks) for rank in range(ranks)]
    held: list[list[int]] = [[] for _ in range(ranks)]
    busy = [0.0] * ranks
    for expert in sorted(range(experts), key=lambda expert: (-each[expert], expert)):
        for _ in range(counts[expert]):
            free = [rank for rank in range(ranks) if len(held[rank]) < room[rank]]
            rank = min(free, key=lambda rank: (expert in held[rank], busy[rank], rank))
            held[rank].append(expert)
            busy[rank] += each[expert]
    _swap(held, each, busy)
    found = ExpertPlacement(tuple(tuple(sorted(own)) for own in held))
    if redundant:
        return found
    plain = (ExpertPlacement.contiguous(experts, ranks), ExpertPlacement.strided(experts, ranks))
    return min((found, *plain), key=lambda placement: imbalance(placement, load))


def _copies(load: Sequence[float], ranks: int, redundant: int) -> list[int]:
    """How many copies each expert has."""
    counts = [1] * len(load)
    queue = [(-value, expert) for expert, value in enumerate(load)]
    heapq.heapify(queue)
    for _ in range(redundant):
        _, expert = heapq.heappop(queue)
        counts[expert] += 1
        if counts[expert] < ranks:  # a rank that has an expert twice gains nothing
            heapq.heappush(queue, (-load[expert] / counts[expert], expert))
    return counts


def _swap(held: list[list[int]], each: Sequence[float], busy: list[float]) -> None:
    """Swap experts of the busiest rank with others' while that makes the busier of the two less busy."""
    for _ in range(MOST_SWAPS):
        top = max(range(len(held)), key=lambda rank: busy[rank])
        best: tuple[float, int, int, int] | None = None
        for rank, own in enumerate(held):
            for mine, expert in enumerate(held[top]):
                for theirs, other in enumerate(own):
                    gain = each[expert] - each[other]
                    if rank == top or gain <= 0 or expert in own or other in held[top]:
                        continue
                    after = max(busy[top] - gain, busy[rank] + gain)
                    if after < busy[top] * (1 - 1e-9) and (best is None or after < best[0]):
                        best = after, rank, mine, theirs
        if best is None:
            return
        _, rank, mine, theirs = best
        gain = each[held[top][mine]] - each[held[rank][theirs]]
        held[top][mine], held[rank][theirs] = held[rank][theirs], held[top][mine]
        busy[top] -= gain
        busy[rank] += gain
