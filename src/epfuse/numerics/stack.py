"""What one projection of all experts is, in any format whose numbers don't lie as a plain tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class ExpertStack(ABC):
    """The matrices of L experts, ``[L, N, K]``, in a format of its own: a frozen dataclass of tensors."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(L, N, K) of the numbers, however they lie and whatever is padded."""

    @abstractmethod
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All memory of the stack: the codes first, then the scales."""

    @abstractmethod
    def matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One expert's ``[N, K]`` as plain numbers; what ``dtype`` can hold is exact."""

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.tensors()[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())
