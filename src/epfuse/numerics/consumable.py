"""Weights whose memory another format takes over: what is left of them says so."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from epfuse.errors import ConfigError


@dataclass(frozen=True)
class Consumable:
    """A frozen dataclass of tensors that can be given up, because their bytes come to mean something else.

    After that every use of a tensor raises; the rest of the object can still be looked at, and it holds no memory.
    """

    def consume(self, became: str) -> None:
        """Give the tensors up, before their memory is written.

        Args:
            became: what their memory holds from now on.
        """
        for name in [field.name for field in fields(self)]:
            if isinstance(self.__dict__.get(name), torch.Tensor):
                object.__delattr__(self, name)
        object.__setattr__(self, "_became", became)

    def __repr__(self) -> str:
        became = self.__dict__.get("_became")
        kept = self.__dict__.get(fields(self)[0].name)
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
