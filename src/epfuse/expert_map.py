"""Which global experts this rank holds, and in which slot."""

from __future__ import annotations

import torch

from epfuse.arguments import integer
from epfuse.errors import ConfigError, DeviceError, ExpertMapError
from epfuse.target import device_of

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Dtypes that a map may come in."""
MOST_EXPERTS = 2**24
"""Experts of a layer: far more than any model has, and few enough for a map to be made of any number that is given."""


def experts_of_rank(num_experts: int, ep_size: int, ep_rank: int) -> range:
    """The experts of one rank where they are dealt out in order: E // P each, the first E % P ranks one more.

    As vLLM deals them out (determine_expert_map, placement "linear"). Ranks past the last expert hold none.

    Args:
        num_experts: E.
        ep_size: P.
        ep_rank: 0..P-1.

    Raises:
        ConfigError: a number is no integer or out of range.
    """
    experts = integer("num_experts", num_experts, least=1, most=MOST_EXPERTS)
    ranks = integer("ep_size", ep_size, least=1)
    rank = integer("ep_rank", ep_rank)
    if rank >= ranks:
        raise ConfigError(f"ep_rank is {rank}; it must be in 0..{ranks - 1}, below ep_size")
    share, more = divmod(experts, ranks)
    first = rank * share + min(rank, more)
    return range(first, first + share + (rank < more))


class ExpertMap:
    """Global expert id -> local slot 0..L-1, or -1 for an expert that another rank holds.

    A type of its own because a 0/1 ownership mask has the same shape and dtype and would be silent garbage as a
    map. The check runs once here, never per call.

    Args:
        tensor: ``[E]`` integer; its non-negative entries must be exactly 0..L-1, each once.

    Raises:
        ExpertMapError: not one-dimensional, not integer, empty, or not an injective map onto 0..L-1.
    """

    __slots__ = ("_by_device", "num_experts", "num_local")

    def __init__(self, tensor: torch.Tensor) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise ExpertMapError(f"expert map is a {type(tensor).__name__}; it must be a torch.Tensor [E]")
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise ExpertMapError(f"expert map has layout {tensor.layout}; it must be a plain tensor (.to_dense())")
        if tensor.dim() != 1 or not 1 <= tensor.numel() <= MOST_EXPERTS:
            raise ExpertMapError(
                f"expert map has shape {tuple(tensor.shape)}; it must be [E] with E >= 1, at most {MOST_EXPERTS}"
            )
        if tensor.dtype not in INTEGERS:
            raise ExpertMapError(
                f"expert map has dtype {tensor.dtype}; it must be integer: local slots and -1, not an ownership mask"
            )
        if tensor.is_meta or type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise ExpertMapError(
                f"expert map is a {type(tensor).__name__} on {tensor.device}, which has no entries to check; make it"
                " from a tensor on the CPU or on the GPU"
            )
        slots = tensor.detach().to("cpu", torch.int64)
        if int(slots.min()) < -1:
            raise ExpertMapError(f"expert map holds {int(slots.min())}; entries are local slots or -1")
        held = torch.sort(slots[slots >= 0]).values
        if not torch.equal(held, torch.arange(held.numel(), device="cpu")):
            mask = set(slots.tolist()) <= {0, 1}
            raise ExpertMapError(
                "expert map "
                + ("looks like a 0/1 ownership mask" if mask else "is not one-to-one onto 0..L-1")
                + f" (non-negative entries, sorted: {held[:8].tolist()}{'...' if held.numel() > 8 else ''});"
                " it must hold each local slot 0..L-1 exactly once and -1 for every expert of another rank"
            )
        self.num_experts: int = int(slots.numel())
        self.num_local: int = int(held.numel())
        # a copy: what was checked can't be changed by writing to the caller's tensor
        self._by_device = {tensor.device: slots.to(tensor.device, torch.int32, copy=True)}

    @classmethod
    def contiguous(cls, num_experts: int, ep_size: int, ep_rank: int, device: torch.device | str = "cpu") -> ExpertMap:
        """Rank ``ep_rank`` of ``ep_size`` holds its share of the experts, in order: `experts_of_rank`.

        Args:
            num_experts: E.
            ep_size: P.
            ep_rank: 0..P-1.
            device: where the map will be used; that of the call's tensors.

        Raises:
            ConfigError: a number is no integer or out of range.
            DeviceError: there is no such device.
        """
        held = experts_of_rank(num_experts, ep_size, ep_rank)
        slots = torch.full((int(num_experts),), -1, dtype=torch.int32, device="cpu")
        slots[held.start : held.stop] = torch.arange(len(held), dtype=torch.int32, device="cpu")
        found = cls(slots)
        found.on(device_of("device", device))
        return found

    @classmethod
    def all_local(cls, num_experts: int, device: torch.device | str = "cpu") -> ExpertMap:
        """One rank holds every expert: the identity."""
        return cls.contiguous(num_experts, 1, 0, device)

    @classmethod
    def of_checked(cls, slots: torch.Tensor, num_local: int) -> ExpertMap:
        """A map of `nearest`'s tensor, ``[E]`` int32 with L slots, which was checked when the map was made."""
        found = cls.__new__(cls)
        found.num_experts, found.num_local = slots.shape[0], num_local
        found._by_device = {slots.device: slots}
        return found

    def nearest(self, device: torch.device) -> torch.Tensor:
        """The map as ``[E]`` int32: the copy on ``device`` if there is one, else another; nothing is made or kept."""
        found = self._by_device.get(device)
        return next(iter(self._by_device.values())) if found is None else found

    def on(self, device: torch.device) -> torch.Tensor:
        """The map as ``[E]`` int32 on ``device``; copied there once and kept.

        Raises:
            DeviceError: there is no such device.
        """
        found = self._by_device.get(device)
        if found is None:
            source = next(iter(self._by_device.values()))
            try:
                found = source.to(device)
            except (RuntimeError, AssertionError, NotImplementedError) as error:
                raise DeviceError(f"device is {device}; {str(error).splitlines()[0]}") from None
            self._by_device[device] = found
        return found

    def __repr__(self) -> str:
        return f"ExpertMap(num_experts={self.num_experts}, num_local={self.num_local})"
