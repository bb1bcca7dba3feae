"""Tensors between guard zones: what a kernel writes there shows, and what it reads there must not matter."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

T = TypeVar("T")

ZONE = 16384
"""Bytes before and behind; more than a row or a block of any test."""


class Guards(TorchFunctionMode):
    """Within, what ``empty``, ``new_empty``, ``empty_like`` and ``zeros`` return lies between zones of ``fill``.

    Args:
        fill: byte of the zones, and of memory that nothing has written: 0xFF is NaN in every float format.
    """

    def __init__(self, fill: int) -> None:
        super().__init__()
        self.fill = fill
        self._made: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like, torch.Tensor.new_empty, torch.zeros):
            if func is torch.zeros:
                return self.copy(result)
            return self._place(result)
        return result

    def _place(self, like: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            storage = torch.full((2 * ZONE + like.nbytes,), self.fill, dtype=torch.uint8, device=like.device)
            self._made.append((storage, like.nbytes))
            return storage[ZONE : ZONE + like.nbytes].view(like.dtype).view(like.shape)

    def copy(self, value: T) -> T:
        """A copy whose tensors have guard zones, of a tensor or of a dataclass that holds some."""
        if isinstance(value, torch.Tensor):
            return self._place(value.contiguous()).copy_(value)  # type: ignore[return-value]
        if not dataclasses.is_dataclass(value):
            return value
        made = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(made, field.name, self.copy(getattr(value, field.name)))
        return made

    def check(self) -> int:
        """Raise if a zone was written; how many tensors were looked at."""
        for storage, size in self._made:
            for name, zone in (("before", storage[:ZONE]), ("behind", storage[ZONE + size :])):
                touched = (zone != self.fill).nonzero()
                if touched.numel():
                    raise AssertionError(f"{touched.numel()} bytes {name} a tensor of {size} were written")
        return len(self._made)
