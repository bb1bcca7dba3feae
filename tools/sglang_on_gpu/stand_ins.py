"""SGLang's layer imported on a GPU without the packages of compiled kernels that it names at its top.

``sglang-kernel`` is a wheel of 356 MiB for one release of torch. Of all that it has, a BF16 layer of the Triton runner
calls two functions, and SGLang's Python has twins of both. What else is asked of such a package can be imported and
not be called: its name is in the error.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

PACKAGES = ("sgl_kernel", "IPython")
"""Compiled kernels, and what only a notebook uses."""
TWINS = {
    "sgl_kernel.moe_align_block_size": ("sglang.kernels.ops.moe.moe_align", "moe_align_block_size"),
    "sgl_kernel.moe_sum_reduce": ("sglang.kernels.ops.moe.fused_moe_triton_kernels", "moe_sum_reduce_triton"),
}
"""What is called, and the module and name of SGLang's own twin: CUDA that is compiled when it is needed, and Triton."""


class NotThere:
    """Something that is imported and never used; any part of it is the same.

    Args:
        name: dotted.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> NotThere:
        if name.startswith("__"):
            raise AttributeError(name)
        return NotThere(f"{self._name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{self._name} is called, which this run does without")


class _KernelPackage(ModuleType):
    """A package of kernels that is not there."""

    __path__: list[str] = []  # noqa: RUF012 - as every package's

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        return _twin(*TWINS[full]) if full in TWINS else NotThere(full)


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] in self._packages:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _KernelPackage(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> tuple[str, ...]:
    """Stand in for those of `PACKAGES` that are not installed, in this process, before SGLang is imported.

    Returns:
        Their names.
    """
    missing = tuple(name for name in PACKAGES if importlib.util.find_spec(name) is None)
    sys.meta_path.insert(0, _StandInFinder(missing))
    return missing


def _twin(module: str, name: str) -> Callable[..., Any]:
    """Found when it is called: its module may be one that asks for this."""

    def call(*arguments: Any, **named: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments, **named)

    return call
