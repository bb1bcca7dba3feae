"""Codes with scales whose memory another format may take over: what is left of them says so, and so does the memory."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from epfuse.errors import ConfigError, DeviceError, LayoutError
from epfuse.numerics.stack import ExpertStack


@dataclass(frozen=True, repr=False)
class Consumable(ExpertStack):
    """Codes and scales that can be given up, because their bytes come to mean something else.

    After that every use of a tensor raises; the rest of the object can still be looked at, and it holds no memory.

    Attributes:
        values: the codes, in the order of the numbers: ``[.., N, K]``.
        scales: of groups of them.
    """

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the values, ``[.., N, K]``."""
        return self.values.shape

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Values, then scales."""
        return self.values, self.scales

    def require_together(self) -> None:
        """Refuse values and scales that don't lie alike.

        Raises:
            DeviceError: they are on two devices.
            LayoutError: one is not contiguous.
        """
        if self.scales.device != self.values.device:
            raise DeviceError(
                f"scales is on {self.scales.device} and values on {self.values.device}; both must be on one device"
            )
        for name, tensor in (("values", self.values), ("scales", self.scales)):
            if not tensor.is_contiguous():
                raise LayoutError(
                    f"{name} has strides {tensor.stride()}; it must be contiguous (call .contiguous() once at load)"
                )

    @abstractmethod
    def check_fnuz(self) -> None:
        """Refuse what E4M3FNUZ, whose scales are doubled, can't hold. Syncs with the device; meant for load time.

        Raises:
            DtypeError: the values are in E4M3FNUZ already.
            ConfigError: a scale has no double.
        """

    @abstractmethod
    def to_fnuz_(self) -> Self:
        """The same numbers in E4M3FNUZ, for gfx94x, in the memory of this one, which is consumed.

        Raises:
            DtypeError, ConfigError: as `check_fnuz`; nothing is changed.
        """

    def consume(self, became: str, *overwritten: str) -> None:
        """Give the tensors up, before their memory is written.

        Args:
            became: what their memory holds from now on.
            overwritten: names of the tensors whose bytes change; the others are given up, and may be used elsewhere.
        """
        for name in overwritten:
            _note_overwritten(getattr(self, name), became)
        for name in [field.name for field in fields(self)]:
            if isinstance(self.__dict__.get(name), torch.Tensor):
                object.__delattr__(self, name)
        object.__setattr__(self, "_became", became)

    def __repr__(self) -> str:
        became = self.__dict__.get("_became")
        kept = self.__dict__.get("values")
        what = f"became {became}" if became else "" if kept is None else f"{tuple(kept.shape)}, {kept.dtype}"
        return f"{type(self).__name__}({what})"

    if not TYPE_CHECKING:  # so that mypy still knows which attributes there are

        def __getattr__(self, name: str) -> object:
            # only reached where there is no such attribute: a use of what is there costs nothing
            became = self.__dict__.get("_became")
            if became is None or name not in {field.name for field in fields(self)}:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            raise ConfigError(
                f"these {type(self).__name__} weights are gone: their memory holds {became} now; use what the"
                " conversion returned (weights = weights.prepare(...)), or load them again"
            )


_OVERWRITTEN: dict[int, tuple[StorageWeakRef, list[tuple[int, int, str]]]] = {}
"""Storage -> the bytes of it, from and to, that hold another format now, and which. A storage's key can't come to mean
another one while its weak reference is here."""


def _note_overwritten(tensor: torch.Tensor, became: str) -> None:
    for key in [key for key, (storage, _) in _OVERWRITTEN.items() if storage.expired()]:  # type: ignore[no-untyped-call]
        del _OVERWRITTEN[key]
    storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    begin = int(tensor.storage_offset()) * tensor.element_size()
    _, parts = _OVERWRITTEN.setdefault(storage.cdata, (storage, []))
    parts.append((begin, begin + tensor.nbytes, became))


def note_restored(tensor: torch.Tensor) -> None:
    """Say that a tensor's memory holds what its dtype says again, after `Consumable.consume`.

    Args:
        tensor: contiguous, all of it written.
    """
    key = tensor.untyped_storage()._cdata
    if key not in _OVERWRITTEN:
        return
    storage, parts = _OVERWRITTEN[key]
    begin = int(tensor.storage_offset()) * tensor.element_size()
    end = begin + tensor.nbytes
    _OVERWRITTEN[key] = (storage, [part for part in parts if not (begin <= part[0] and part[1] <= end)])


def require_as_loaded(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor whose memory a conversion has overwritten: its bytes don't mean what its dtype says.

    Args:
        name: what an error calls the tensor.
        tensor: contiguous; looked up by its memory, so that a view or a detached copy of the same memory is found too.

    Raises:
        ConfigError: as said. It stays so while the memory lives, until `note_restored`.
    """
    if not _OVERWRITTEN or torch.compiler.is_compiling():
        return
    _, parts = _OVERWRITTEN.get(tensor.untyped_storage()._cdata, (None, ()))
    begin = int(tensor.storage_offset()) * tensor.element_size()
    for first, last, became in parts:
        if first < begin + tensor.nbytes and begin < last:
            raise ConfigError(
                f"{name} lies in memory that holds {became} now: ExpertWeights.prepare() wrote it there; use what it"
                " returned, or load the weights into new memory"
            )
