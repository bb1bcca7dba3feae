"""Gluon's device functions as plain Python on numpy, for tests of the addresses they make: no interpreter runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pytest
from triton.experimental.gluon._runtime import GluonJITFunction


class Numbers(np.ndarray):
    """An array with the method by which device code casts."""

    def to(self, dtype: type) -> Numbers:
        return self.astype(dtype)


def numbers(values: object, dtype: type = np.int32) -> Numbers:
    return np.asarray(values, dtype).view(Numbers)


class PlainLanguage:
    """What the address functions use of `gluon.language`; layouts mean nothing here."""

    int64 = np.int64
    constexpr = object

    def __init__(self, program: int = 0) -> None:
        self.program = program

    def program_id(self, axis: int) -> Numbers:
        return numbers(self.program)

    @staticmethod
    def num_warps() -> int:
        return 4

    @staticmethod
    def arange(first: int, end: int, layout: object = None) -> Numbers:
        return numbers(np.arange(first, end))

    @staticmethod
    def minimum(a: object, b: object) -> Numbers:
        return numbers(np.minimum(a, b), np.result_type(a, b).type)

    @staticmethod
    def maximum(a: object, b: object) -> Numbers:
        return numbers(np.maximum(a, b), np.result_type(a, b).type)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.endswith("Layout"):
            return lambda *args: None
        raise AttributeError(name)


@contextmanager
def plain(
    *modules: ModuleType, machine: type[PlainLanguage] = PlainLanguage, **others: object
) -> Iterator[PlainLanguage]:
    """Within, the device functions of these modules are plain functions, all for one program.

    Args:
        modules: the function's own and those of what it calls.
        machine: the language that they run on.
        others: stand-ins for functions by name.
    """
    language = machine()
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            functions = {name: value.fn for name, value in vars(module).items() if isinstance(value, GluonJITFunction)}
            for name, value in {**functions, "gl": language, **others}.items():
                if hasattr(module, name):
                    patch.setattr(module, name, value)
        yield language
