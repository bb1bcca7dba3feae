"""Which global experts this rank holds, and in which slot."""

from __future__ import annotations

import torch

from epfuse.errors import ConfigError, ExpertMapError


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
        if tensor.dim() != 1 or tensor.numel() == 0:
            raise ExpertMapError(f"expert map has shape {tuple(tensor.shape)}; it must be [E] with E >= 1")
        if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
            raise ExpertMapError(
                f"expert map has dtype {tensor.dtype}; it must be integer: local slots and -1, not an ownership mask"
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
        self.num_experts = int(slots.numel())
        self.num_local = int(held.numel())
        # a copy: what was checked can't be changed by writing to the caller's tensor
        self._by_device = {tensor.device: slots.to(tensor.device, torch.int32, copy=True)}

    @classmethod
    def contiguous(cls, num_experts: int, ep_size: int, ep_rank: int, device: torch.device | str = "cpu") -> ExpertMap:
        """Rank ``ep_rank`` of ``ep_size`` holds the experts ``[ep_rank * E/P, (ep_rank + 1) * E/P)``, in order.

        Raises:
            ConfigError: ``num_experts`` is not a multiple of ``ep_size``, or ``ep_rank`` is out of range.
        """
        for name, value in (("num_experts", num_experts), ("ep_size", ep_size), ("ep_rank", ep_rank)):
            if not isinstance(value, int):
                raise ConfigError(f"{name} is {value!r}; it must be an integer")
        if ep_size < 1 or num_experts < 1 or num_experts % ep_size:
            raise ConfigError(
                f"num_experts is {num_experts}; it must be a positive multiple of ep_size, which is {ep_size}"
            )
        if not 0 <= ep_rank < ep_size:
            raise ConfigError(f"ep_rank is {ep_rank}; it must be in 0..{ep_size - 1}")
        local = num_experts // ep_size
        slots = torch.full((num_experts,), -1, dtype=torch.int32, device="cpu")
        slots[ep_rank * local : (ep_rank + 1) * local] = torch.arange(local, dtype=torch.int32, device="cpu")
        return cls(slots.to(device))

    @classmethod
    def all_local(cls, num_experts: int, device: torch.device | str = "cpu") -> ExpertMap:
        """One rank holds every expert: the identity."""
        return cls.contiguous(num_experts, 1, 0, device)

    def on(self, device: torch.device) -> torch.Tensor:
        """The map as ``[E]`` int32 on ``device``; copied there once and kept."""
        found = self._by_device.get(device)
        if found is None:
            source = next(iter(self._by_device.values()))
            found = self._by_device[device] = source.to(device)
        return found

    def __repr__(self) -> str:
        return f"ExpertMap(num_experts={self.num_experts}, num_local={self.num_local})"
