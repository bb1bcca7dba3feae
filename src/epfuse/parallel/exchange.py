"""How tokens reach the ranks that hold their experts, and how the results come back; each mode is a type.

| mode | each rank passes | each rank gets | on the wire, a rank |
| --- | --- | --- | --- |
| `Replicated` | the same T tokens | the layer of all T | all_reduce of T rows |
| `SequenceParallel` | the same T tokens | the layer of its T / P | reduce_scatter of T rows |
| `AllGather` | its own tokens | the layer of its own | all_gather and reduce_scatter of P * room rows |
| `Dispatch` | its own tokens | the layer of its own | two all_to_all of P * room rows |
| `CompactDispatch` | its own tokens | the layer of its own | two all_to_all of P * capacity rows |

All but `CompactDispatch` can be captured in a graph, with the collectives in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from epfuse.arguments import checks_enums, integer
from epfuse.errors import ConfigError, DtypeError, LayoutError, ShapeError
from epfuse.parallel.group import EPGroup, SumIn
from epfuse.parallel.payload import AS_GIVEN, Payload, blank, pack, unpack
from epfuse.parallel.placement import ExpertPlacement, check_ids

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""This rank's share of the layer: (hidden ``[N, H]``, topk_weights ``[N, K]`` float32, topk_ids ``[N, K]``) -> ``[N,
H]``; `epfuse.fused_experts` with the rank's weights and map."""
Finish = Callable[[], torch.Tensor]


class Exchange(ABC):
    """One layer call over all ranks: every rank of the group calls it at the same time, with the same mode.

    Attributes:
        group: the ranks.
    """

    group: EPGroup

    def facts(self, dtype: torch.dtype, top_k: int) -> dict[str, str]:
        """What must be equal on every rank of a call and no rank can see of another, for `agree_on_layer`.

        Ranks that differ in it read each other's bytes as something else, or send other numbers of them.

        Args:
            dtype: of the activations.
            top_k: K.
        """
        own = {
            name: str(value) for name, value in vars(self).items() if name in ("room", "capacity", "sum_in", "payload")
        }
        return {"exchange": type(self).__name__, "activations": str(dtype), "K": str(top_k)} | own

    def __call__(
        self,
        hidden: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        experts: Experts,
        overlap: Callable[[], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The routed experts' output, and ``overlap``'s added to it.

        Args:
            hidden: ``[T, H]`` contiguous; the module's table says which tokens a rank passes. T may be 0.
            topk_weights: ``[T, K]`` float32 contiguous; K is the same on every rank.
            topk_ids: ``[T, K]`` int32 or int64 expert ids, physical ones where experts have copies
                (`epfuse.parallel.placement.PhysicalIds`).
            experts: this rank's share.
            overlap: called while the sum, or the results' way back, is under way on the collective's own stream; it
                returns what is added to this rank's result, of its shape and dtype, such as a model's shared expert of
                the same tokens.

        Returns:
            Rows as the table says, in hidden's dtype.

        Raises:
            ShapeError, DtypeError, LayoutError: an argument or what ``experts`` or ``overlap`` returns does not fit, or
                there are more tokens than there is room for.
        """
        if hidden.dim() != 2 or topk_ids.dim() != 2 or topk_ids.shape[0] != hidden.shape[0]:
            raise ShapeError(
                f"hidden has shape {tuple(hidden.shape)} and topk_ids {tuple(topk_ids.shape)}; they must be [T, H] and"
                " [T, K]"
            )
        if topk_weights.shape != topk_ids.shape:
            raise ShapeError(
                f"topk_weights has shape {tuple(topk_weights.shape)}; it must be topk_ids' {tuple(topk_ids.shape)}"
            )
        if topk_weights.dtype != torch.float32:
            raise DtypeError(f"topk_weights has dtype {topk_weights.dtype}; it must be float32")
        check_ids(topk_ids)
        if not hidden.is_contiguous():
            raise LayoutError(f"hidden has strides {hidden.stride()}; it must be contiguous (call .contiguous())")

        def share(rows: torch.Tensor, row_weights: torch.Tensor, row_ids: torch.Tensor) -> torch.Tensor:
            return _like("experts", experts(rows, row_weights, row_ids), rows)

        if self.group.size == 1:
            total = share(hidden, topk_weights, topk_ids)
            return total if overlap is None else total + _like("overlap", overlap(), total)
        finish = self._start(hidden, topk_weights, topk_ids, share)
        if overlap is None:
            return finish()
        beside = overlap()
        total = finish()
        return total + _like("overlap", beside, total)

    @abstractmethod
    def _start(
        self, hidden: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, experts: Experts
    ) -> Finish:
        """Everything up to the last collective, which is under way when this returns."""


@checks_enums
@dataclass(frozen=True)
class Replicated(Exchange):
    """Every rank has the same tokens and gets the whole sum.

    Args:
        group: the ranks.
        sum_in: how partial sums travel.
    """

    group: EPGroup
    sum_in: SumIn = SumIn.FLOAT32

    def _start(
        self, hidden: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, experts: Experts
    ) -> Finish:
        return self.group.start_all_reduce(experts(hidden, topk_weights, topk_ids), self.sum_in).finish


@checks_enums
@dataclass(frozen=True)
class SequenceParallel(Exchange):
    """Every rank has the same tokens and gets its share of the sum's rows: ceil(T / P) each, as far as T goes.

    Args:
        group: the ranks.
        sum_in: how partial sums travel.
    """

    group: EPGroup
    sum_in: SumIn = SumIn.FLOAT32

    def _start(
        self, hidden: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, experts: Experts
    ) -> Finish:
        partial, own = experts(hidden, topk_weights, topk_ids), self.rows_of(hidden.shape[0])
        share = -(-hidden.shape[0] // self.group.size)
        whole = torch.nn.functional.pad(partial, (0, 0, 0, share * self.group.size - hidden.shape[0]))
        pending = self.group.start_reduce_scatter(whole, self.sum_in)
        return lambda: pending.finish()[: len(own)]

    def rows_of(self, tokens: int) -> range:
        """The rows of ``tokens`` that this rank gets."""
        share = -(-tokens // self.group.size)
        return range(min(self.group.rank * share, tokens), min((self.group.rank + 1) * share, tokens))


@checks_enums
@dataclass(frozen=True)
class AllGather(Exchange):
    """Every rank has its own tokens, sees everybody's, and gets the sum of its own.

    Args:
        group: the ranks.
        room: tokens that every rank sends; a rank with fewer fills up with rows that have no route. At least the most
            that a rank has, and the same on every rank: a server's largest batch, or `EPGroup.largest`.
        sum_in: how partial sums travel.
        payload: how activations travel.

    Raises:
        ConfigError: room is no positive integer.
    """

    group: EPGroup
    room: int
    sum_in: SumIn = SumIn.FLOAT32
    payload: Payload = AS_GIVEN

    def __post_init__(self) -> None:
        object.__setattr__(self, "room", integer("room", self.room, least=1))

    def _start(
        self, hidden: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, experts: Experts
    ) -> Finish:
        (tokens, width), top_k = hidden.shape, topk_ids.shape[1]
        _check_room(tokens, self.room)
        own = pack(hidden, topk_weights, topk_ids, self.payload)
        filled = torch.cat([own, blank(self.room - tokens, top_k, width, hidden, self.payload)])
        every = unpack(self.group.start_all_gather(filled).finish(), top_k, width, hidden.dtype, self.payload)
        partial = experts(every.hidden, every.topk_weights, every.topk_ids)
        pending = self.group.start_reduce_scatter(partial, self.sum_in)
        return lambda: pending.finish()[:tokens]


@dataclass(frozen=True)
class Dispatch(Exchange):
    """Every rank has its own tokens and sends one copy of each to every rank that holds one of its experts.

    There is room for all of a rank's tokens at every destination, so nothing can overflow whatever the router does. The
    results come back in the activations' dtype, and a token's are added in float32 in the order of the ranks: the bits
    depend on no backend.

    Args:
        group: the ranks.
        placement: who holds which physical expert.
        room: as of `AllGather`.
        payload: how activations travel there.

    Raises:
        ConfigError: room is no positive integer, or the placement is one of another number of ranks.
    """

    group: EPGroup
    placement: ExpertPlacement
    room: int
    payload: Payload = AS_GIVEN
    _owners: _Owners = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "room", integer("room", self.room, least=1))
        _check_ranks(self.placement, self.group)
        object.__setattr__(self, "_owners", _Owners(self.placement))

    def _start(
        self, hidden: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, experts: Experts
    ) -> Finish:
        _check_room(hidden.shape[0], self.room)
        wanted = self._owners.wanted(topk_ids)
        return _dispatch(self.group, hidden, topk_weights, topk_ids, wanted, self.room, self.payload, experts)


@dataclass(frozen=True)
class CompactDispatch(Exchange):
    """`Dispatch` with room for few tokens at a destination. The ranks ask each other first whether they suffice.

    If a rank has more for one destination, all of them learn of it before anything is sent, and that call takes as
    much room as `Dispatch`: slower, and as exact. Asking takes a host sync, so this is for eager mode alone.

    Args:
        group: the ranks.
        placement: who holds which physical expert.
        room: as of `AllGather`.
        capacity: tokens that a rank can send to one destination, at most ``room``.
        payload: how activations travel there.

    Raises:
        ConfigError: a number is out of range, or the placement is one of another number of ranks.
    """

    group: EPGroup
    placement: ExpertPlacement
    room: int
    capacity: int
    payload: Payload = AS_GIVEN
    _owners: _Owners = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "room", integer("room", self.room, least=1))
        object.__setattr__(self, "capacity", integer("capacity", self.capacity, least=1, most=self.room))
        _check_ranks(self.placement, self.group)
        object.__setattr__(self, "_owners", _Owners(self.placement))

    def _start(
        self, hidden: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, experts: Experts
    ) -> Finish:
        if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ConfigError(
                "CompactDispatch can't be captured in a graph, because its ranks ask each other; Dispatch can"
            )
        _check_room(hidden.shape[0], self.room)
        wanted = self._owners.wanted(topk_ids)
        most = self.group.largest(wanted.sum(0).amax())
        rows = self.capacity if most <= self.capacity else self.room
        return _dispatch(self.group, hidden, topk_weights, topk_ids, wanted, rows, self.payload, experts)


class _Owners:
    """Who holds which physical expert, on each device that asks."""

    def __init__(self, placement: ExpertPlacement) -> None:
        # one more: of ids that are no expert; no rank has this number
        no_rank = torch.tensor([placement.ranks], device="cpu")
        self._by_device = {torch.device("cpu"): torch.cat([placement.owners(), no_rank])}
        self._ranks = placement.ranks

    def wanted(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """``[T, P]`` bool: whether a token has a route to a rank."""
        device = topk_ids.device
        owners = self._by_device.get(device)
        if owners is None:
            owners = self._by_device.setdefault(device, self._by_device[torch.device("cpu")].to(device))
        experts = owners.shape[0] - 1
        ids = torch.where((topk_ids >= 0) & (topk_ids < experts), topk_ids, experts).long()
        return (owners[ids][:, :, None] == torch.arange(self._ranks, device=device)).any(1)


def _dispatch(
    group: EPGroup,
    hidden: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    wanted: torch.Tensor,
    rows: int,
    payload: Payload,
    experts: Experts,
) -> Finish:
    """Send each rank the tokens that want it, in ``rows`` rows, and add up what comes back; ``wanted`` must fit."""
    (tokens, width), top_k, ranks = hidden.shape, topk_ids.shape[1], group.size
    row_of = wanted.cumsum(0) - 1 + rows * torch.arange(ranks, device=hidden.device)
    # each row of the message: the token in it, or the blank one after the last
    token_of = torch.full((ranks * rows + 1,), tokens, device=hidden.device)
    every = torch.arange(tokens, device=hidden.device)[:, None].expand(-1, ranks)
    token_of.scatter_(0, torch.where(wanted, row_of, ranks * rows).flatten(), every.flatten())
    packed = torch.cat([pack(hidden, topk_weights, topk_ids, payload), blank(1, top_k, width, hidden, payload)])
    sent = group.start_all_to_all(packed.index_select(0, token_of[:-1]))
    there = unpack(sent.finish(), top_k, width, hidden.dtype, payload)
    results = experts(there.hidden, there.topk_weights, there.topk_ids)
    pending = group.start_all_to_all(results)

    def add_up() -> torch.Tensor:
        back, total = pending.finish(), torch.zeros(tokens, width, device=hidden.device)
        for rank in range(ranks):
            part = back.index_select(0, row_of[:, rank].clamp(min=0)).float()
            total += torch.where(wanted[:, rank, None], part, 0.0)
        return total.to(hidden.dtype)

    return add_up


def _like(name: str, found: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What a callable returned, if it may be sent or added: torch would stretch one row, and widen a dtype."""
    if found.shape != rows.shape:
        raise ShapeError(f"{name} returned shape {tuple(found.shape)}; it must be {tuple(rows.shape)}")
    if found.dtype != rows.dtype:
        raise DtypeError(f"{name} returned dtype {found.dtype}; it must be the activations' {rows.dtype}")
    return found


def _check_room(tokens: int, room: int) -> None:
    if tokens > room:
        raise ShapeError(f"hidden has {tokens} tokens; room is {room}, and must be at least the most that a rank has")


def _check_ranks(placement: ExpertPlacement, group: EPGroup) -> None:
    if placement.ranks != group.size:
        raise ConfigError(f"placement is one of {placement.ranks} ranks; the group has {group.size}")
