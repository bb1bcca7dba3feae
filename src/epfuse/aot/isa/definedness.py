"""Which bytes of the host's tensors have been written: what torch.empty returns has none."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_EMPTY = frozenset(
    {
        "aten::empty",
        "aten::empty_like",
        "aten::empty_strided",
        "aten::empty_permuted",
        "aten::new_empty",
        "aten::new_empty_strided",
    }
)


class Definedness(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, keeps a byte mask for each storage that torch.empty and its like have made.

    torch's own writes define what they write. A storage that is not known here is defined throughout. Storages that are
    known are kept alive, so that an address stays one storage's.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._masks: dict[int, tuple[torch.UntypedStorage, npt.NDArray[np.bool_]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note what it made or wrote."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._schema.name in _EMPTY:
            storage = result.untyped_storage()
            self._masks[storage.data_ptr()] = (storage, np.zeros(storage.nbytes(), np.bool_))
            return result
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(tensor, torch.Tensor):
                        self._define(tensor)
        return result

    def mask(self, storage: torch.UntypedStorage) -> npt.NDArray[np.bool_] | None:
        """True where a byte of the storage is defined; None where all are."""
        known = self._masks.get(storage.data_ptr())
        return None if known is None else known[1]

    def undefined(self, tensor: torch.Tensor) -> int:
        """How many of the tensor's elements have a byte that nothing wrote."""
        mask = self.mask(tensor.untyped_storage())
        if mask is None:
            return 0
        return tensor.numel() - int(self._elements(tensor, mask).all(-1).sum())

    def _define(self, tensor: torch.Tensor) -> None:
        mask = self.mask(tensor.untyped_storage())
        if mask is not None and tensor.numel():
            self._elements(tensor, mask)[...] = True

    @staticmethod
    def _elements(tensor: torch.Tensor, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """The tensor's bytes as a view of its storage's mask: its shape, and the bytes of an element."""
        size = tensor.element_size()
        return np.lib.stride_tricks.as_strided(
            mask[tensor.storage_offset() * size :],
            (*tensor.shape, size),
            (*(stride * size for stride in tensor.stride()), 1),
        )
