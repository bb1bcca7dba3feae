"""Which rank holds which experts, and copies of which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from epfuse.arguments import integer
from epfuse.errors import ConfigError, DtypeError, ShapeError
from epfuse.expert_map import MOST_EXPERTS, ExpertMap, experts_of_rank
from epfuse.parallel.shard import check_whole


@dataclass(frozen=True)
class RankShare:
    """The experts that one rank holds, by slot: what a rank loads where experts have copies. `ExpertPlacement.share`.

    Args:
        num_experts: E, of the layer.
        held: the expert in each slot; one may stand in several.
    """

    num_experts: int
    held: tuple[int, ...]


@dataclass(frozen=True)
class ExpertPlacement:
    """The experts of each rank, slot by slot, known to all ranks.

    Build it with `contiguous`, `strided`, or `epfuse.parallel.balance.balanced` from a measured load.

    An expert may stand on several ranks. What a rank holds is a physical expert: physical ids 0..E-1 are the experts'
    first copies, in the order of the experts, and the other copies follow. So where there is one copy of each, physical
    ids are the router's own, and an id that nobody translated is right all the same.

    Args:
        held: by rank, the experts in its slots 0..L-1; every expert 0..E-1 is on at least one rank.

    Raises:
        ConfigError: there is no rank, or the experts are not 0..E-1.
    """

    held: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.held:
            raise ConfigError("held is empty; it must have the experts of at least one rank")
        held = tuple(tuple(integer("an expert of held", e, most=MOST_EXPERTS - 1) for e in own) for own in self.held)
        object.__setattr__(self, "held", held)
        experts = {expert for own in held for expert in own}
        if not experts or experts != set(range(len(experts))):
            raise ConfigError(f"held names {len(experts)} experts; they must be 0..E-1, each on at least one rank")

    @classmethod
    def contiguous(cls, num_experts: int, ranks: int) -> ExpertPlacement:
        """Experts in order: E // P a rank, and one more on each of the first E % P ranks.

        Raises:
            ConfigError: a number is no positive integer.
        """
        ranks = integer("ranks", ranks, least=1)
        return cls(tuple(tuple(experts_of_rank(num_experts, ranks, rank)) for rank in range(ranks)))

    @classmethod
    def strided(cls, num_experts: int, ranks: int) -> ExpertPlacement:
        """Expert e is on rank e % P.

        Raises:
            ConfigError: a number is no positive integer.
        """
        ranks = integer("ranks", ranks, least=1)
        experts = integer("num_experts", num_experts, least=1, most=MOST_EXPERTS)
        return cls(tuple(tuple(range(rank, experts, ranks)) for rank in range(ranks)))

    @property
    def ranks(self) -> int:
        """P."""
        return len(self.held)

    @cached_property
    def num_experts(self) -> int:
        """E."""
        return 1 + max(expert for own in self.held for expert in own)

    @property
    def num_physical(self) -> int:
        """E and the copies beyond each expert's first."""
        return sum(len(own) for own in self.held)

    @cached_property
    def _physical(self) -> tuple[tuple[int, ...], ...]:
        """By rank, the physical ids of its slots."""
        found, seen, following = [], set(), self.num_experts
        for own in self.held:
            ids = []
            for expert in own:
                ids.append(following if expert in seen else expert)
                following += expert in seen
                seen.add(expert)
            found.append(tuple(ids))
        return tuple(found)

    @cached_property
    def copies(self) -> tuple[tuple[int, ...], ...]:
        """By expert, the physical ids of its copies."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for own, ids in zip(self.held, self._physical, strict=True):
            for expert, physical in zip(own, ids, strict=True):
                found[expert].append(physical)
        return tuple(map(tuple, found))

    def expert_map(self, rank: int, device: torch.device | str = "cpu") -> ExpertMap:
        """A rank's map from physical ids to its slots.

        Raises:
            ConfigError: no rank has this number.
        """
        slots = torch.full((self.num_physical,), -1, dtype=torch.int32, device="cpu")
        own = self._physical[self._rank(rank)]
        slots[list(own)] = torch.arange(len(own), dtype=torch.int32, device="cpu")
        return ExpertMap(slots.to(device))

    def share(self, rank: int) -> RankShare:
        """What a rank loads.

        Raises:
            ConfigError: no rank has this number.
        """
        return RankShare(self.num_experts, self.held[self._rank(rank)])

    def owners(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """``[S]`` int64: the rank of each physical id."""
        ranks = torch.empty(self.num_physical, dtype=torch.int64, device="cpu")
        for rank, own in enumerate(self._physical):
            ranks[list(own)] = rank
        return ranks.to(device)

    def shard(self, full: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's rows of an all-experts tensor.

        Args:
            full: ``[E, ...]``, any dtype and device.
            rank: 0..P-1.

        Returns:
            ``[L, ...]`` contiguous, a copy: row l is the expert in slot l.

        Raises:
            ConfigError: no rank has this number.
            ShapeError: ``full`` does not have E rows.
            LayoutError: ``full`` is no plain tensor.
        """
        check_whole("full", full)
        if full.dim() == 0 or full.shape[0] != self.num_experts:
            raise ShapeError(f"full has shape {tuple(full.shape)}; it must be [E, ...] with E={self.num_experts}")
        own = self.held[self._rank(rank)]
        return full.index_select(0, torch.tensor(own, dtype=torch.int64, device=full.device))

    def _rank(self, rank: int) -> int:
        return integer("rank", rank, most=self.ranks - 1)


class PhysicalIds:
    """The router's expert ids -> physical ids, on one device, without a host sync.

    Which copy a route takes is a function of the token's row and the expert, so that all ranks that have the same rows
    agree without a word, and each route is computed exactly once.

    Args:
        placement: of the layer.
        device: of the ids.
    """

    def __init__(self, placement: ExpertPlacement, device: torch.device | str = "cpu") -> None:
        counts = [len(ids) for ids in placement.copies]
        most = max(counts)
        table = [[*ids, *([-1] * (most - len(ids)))] for ids in placement.copies]
        # one row more: of ids that are no expert
        self._table = torch.tensor([*table, [-1] * most], dtype=torch.int64, device=device)
        self._counts = torch.tensor([*counts, 1], dtype=torch.int64, device=device)
        self._experts = placement.num_experts

    def __call__(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Choose a copy for each route: an expert's copies take rows in turn.

        Args:
            topk_ids: ``[T, K]`` int32 or int64; -1 and anything outside [0, E) is no expert.

        Returns:
            ``[T, K]`` int64 physical ids, -1 where there is no expert.

        Raises:
            DtypeError: topk_ids is neither int32 nor int64.

        Host syncs: none; graph-capturable.
        """
        check_ids(topk_ids)
        ids = topk_ids.long()
        ids = torch.where((ids >= 0) & (ids < self._experts), ids, self._experts)
        rows = torch.arange(ids.shape[0], device=ids.device)[:, None]
        return self._table[ids, (rows + ids) % self._counts[ids]]


def check_ids(topk_ids: torch.Tensor) -> None:
    """Refuse ids of another dtype than int32 and int64: torch would cut floats down to experts without a word.

    Raises:
        DtypeError: they are.
    """
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"topk_ids has dtype {topk_ids.dtype}; it must be int32 or int64")


def imbalance(placement: ExpertPlacement, load: Sequence[float]) -> float:
    """The busiest rank's load over the mean: 1 is even. An expert's copies share its load evenly.

    Args:
        placement: where the experts are.
        load: ``[E]``, routes or tokens of each expert.

    Raises:
        ShapeError: not one number for each expert.
        ConfigError: a number is negative or not finite.
    """
    loads = rank_loads(placement, load)
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def rank_loads(placement: ExpertPlacement, load: Sequence[float]) -> list[float]:
    """The load of each rank; arguments as of `imbalance`."""
    check_load(load, placement.num_experts)
    return [sum(load[expert] / len(placement.copies[expert]) for expert in own) for own in placement.held]


def check_load(load: Sequence[float], experts: int) -> None:
    """Refuse what is no load of a layer with so many experts."""
    if len(load) != experts:
        raise ShapeError(f"load has {len(load)} numbers; it must have one for each of the {experts} experts")
    for expert, value in enumerate(load):
        if not 0 <= value < float("inf"):
            raise ConfigError(f"load of expert {expert} is {value}; it must be a finite number, 0 or more")
