"""Gluon's memory and products in numpy, for tests that run a whole tile of the Hopper kernels off a GPU.

Copies end where they begin and products when they are asked for: order and waiting are for a GPU to test.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import torch

from tests.stages.plain_gluon import Numbers, PlainLanguage

BFLOAT16, FLOAT8, FLOAT32, INT32, UINT8 = "bfloat16", "float8e4nv", "float32", "int32", "uint8"
TORCH = {
    BFLOAT16: torch.bfloat16,
    FLOAT8: torch.float8_e4m3fn,
    FLOAT32: torch.float32,
    INT32: torch.int32,
    UINT8: torch.uint8,
}


def values(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes ``[.., size]`` as numbers; BF16 as float32."""
    found = torch.from_numpy(np.ascontiguousarray(raw)).view(TORCH[dtype]).squeeze(-1)
    return (found.float() if dtype == BFLOAT16 else found).numpy()


class Pointers(Numbers):
    """Elements of a tensor, by their number; past its ends nothing may be read."""

    memory: np.ndarray
    item: str

    @classmethod
    def to_tensor(cls, tensor: torch.Tensor, item: str) -> Pointers:
        found = np.asarray(0, np.int64).view(cls)
        found.memory, found.item = tensor.contiguous().view(-1).view(torch.uint8).numpy(), item
        return found

    def __array_finalize__(self, source: object) -> None:
        for name in ("memory", "item"):
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))

    def __array_wrap__(self, array: np.ndarray, context: object = None, return_scalar: bool = False) -> Pointers:
        found = np.asarray(array).view(Pointers)  # a number stays an array, which knows its memory
        found.memory, found.item = self.memory, self.item
        return found

    @property
    def size_of_item(self) -> int:
        return TORCH[self.item].itemsize

    @property
    def dtype(self) -> SimpleNamespace:  # type: ignore[override]
        return SimpleNamespace(element_ty=self.item)

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=None)

    def to(self, item: str, bitcast: bool = False) -> Pointers:  # type: ignore[override]
        found = (self * self.size_of_item // TORCH[item].itemsize).view(Pointers)
        found.memory, found.item = self.memory, item
        return found

    def read(self, mask: np.ndarray | None = None) -> np.ndarray:
        """``[.., size]`` bytes; zeros where mask is false."""
        size = self.size_of_item
        at = np.asarray(self, np.int64)[..., None] * size + np.arange(size)
        if mask is not None:
            at = np.where(np.broadcast_to(np.asarray(mask), self.shape)[..., None], at, -1)
        assert at.max(initial=0) < self.memory.size
        assert mask is not None or at.min() >= 0
        return np.where(at >= 0, self.memory[at], 0).astype(np.uint8)


class Shared:
    """A tensor in shared memory: the bytes at ``first + places`` of each element."""

    def __init__(self, memory: np.ndarray, dtype: str, places: np.ndarray) -> None:
        self.memory, self.dtype, self.places = memory, dtype, places

    @property
    def numbers(self) -> np.ndarray:
        return values(self.memory[self.places[..., None] + np.arange(TORCH[self.dtype].itemsize)], self.dtype)

    def write(self, raw: np.ndarray) -> None:
        assert raw.shape[:-1] == self.places.shape
        self.memory[self.places[..., None] + np.arange(raw.shape[-1])] = raw

    def index(self, place: int) -> Shared:
        return Shared(self.memory, self.dtype, self.places[place])

    def slice(self, first: int, count: int, dim: int) -> Shared:
        return Shared(self.memory, self.dtype, np.take(self.places, range(first, first + count), dim))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.memory, self.dtype, self.places.transpose(order))

    def load(self, layout: object) -> Numbers:
        return self.numbers.view(Numbers)

    def _reinterpret(self, dtype: str, shape: list[int], bases: list[list[int]] | None) -> Shared:
        """In row-major order, or of each first index by the bases of a `SharedLinearLayout`."""
        size, first = TORCH[dtype].itemsize, int(self.places.min())
        if bases is None:
            return Shared(self.memory, dtype, first + np.arange(np.prod(shape)).reshape(shape) * size)
        places = np.empty(shape[1:], np.int64)
        for offset, bits in enumerate(itertools.product((0, 1), repeat=len(bases))):
            where = np.asarray(bases)[np.flatnonzero(bits[::-1])].sum(0, initial=0)
            places[tuple(np.asarray(where, np.int64))] = offset
        inner = places.size * size
        return Shared(self.memory, dtype, first + np.arange(shape[0])[:, None, None] * inner + places * size)


class PlainMachine(PlainLanguage):
    """What a tile's main loop uses of `gluon.language` besides."""

    bfloat16, float8e4nv, float32, int32, uint8 = BFLOAT16, FLOAT8, FLOAT32, INT32, UINT8
    static_range = range

    @staticmethod
    def static_assert(condition: bool) -> None:
        assert condition

    @staticmethod
    def pointer_type(item: str) -> str:
        return item

    @staticmethod
    def SharedLinearLayout(bases: list[list[int]]) -> list[list[int]]:
        return bases

    @staticmethod
    def allocate_shared_memory(dtype: str, shape: list[int], layout: object) -> Shared:
        memory = np.full(np.prod(shape) * TORCH[dtype].itemsize, 0xFF, np.uint8)
        return Shared(memory, dtype, np.arange(np.prod(shape)).reshape(shape) * TORCH[dtype].itemsize)

    @staticmethod
    def load(pointers: Pointers, mask: np.ndarray | None = None, **_: object) -> Numbers:
        return values(pointers.read(mask), pointers.item).view(Numbers)

    @staticmethod
    def zeros(shape: list[int], dtype: str, layout: object) -> Numbers:
        return np.zeros(shape).view(Numbers)

    @staticmethod
    def convert_layout(tensor: Numbers, layout: object, assert_trivial: bool = False) -> Numbers:
        return tensor


def copy(stage: Shared, pointers: Pointers, mask: np.ndarray | None = None) -> None:
    stage.write(pointers.read(mask))


COPIES = SimpleNamespace(async_copy_global_to_shared=copy, commit_group=lambda: None, wait_group=lambda pending: None)


def multiply(a: Shared | np.ndarray, b: Shared, acc: np.ndarray, is_async: bool, use_acc: bool = True) -> Numbers:
    a = a.numbers if isinstance(a, Shared) else a
    return (acc * use_acc + np.asarray(a, np.float64) @ b.numbers.astype(np.float64)).view(Numbers)
