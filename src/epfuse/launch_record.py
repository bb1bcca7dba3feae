"""What our kernels launch while somebody watches: the compiled kernel that Triton found, its grid and its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class WatchedLaunch(NamedTuple):
    """One launch.

    Attributes:
        compiled: Triton's ``CompiledKernel``; None where a hook of Triton's forbade it.
        grid: one to three numbers of programs.
        arguments: a value for each parameter of the kernel, constants among them.
    """

    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


@dataclass
class Record:
    """What happened inside `recording`.

    Attributes:
        launches: in their order. Their tensors are kept, so that nothing else is given the same memory meanwhile.
        is_whole: whether launches of our kernels were all that the GPU had to do; torch's operators are none.
    """

    launches: list[WatchedLaunch] = field(default_factory=list)
    is_whole: bool = True


@contextmanager
def recording(record: Record) -> Iterator[None]:
    """Inside, in this thread, ``record`` is written."""
    token = _record.set(record)
    try:
        with _Operators(record) as operators:
            torch.empty(0, device="cpu")
            record.is_whole &= operators.sees  # nothing, where a caller has switched dispatch to Python off
            yield
    finally:
        _record.reset(token)


@contextmanager
def only_loading() -> Iterator[set[Any]]:
    """Inside, in this thread, our kernels are found and loaded, and not launched.

    Yields:
        Triton's ``CompiledKernel`` of each.
    """
    found = set[Any]()
    token = _loaded.set(found)
    try:
        yield found
    finally:
        _loaded.reset(token)


def noted(kernel: Any, before: Callable[[], None]) -> Callable[..., Any]:
    """The ``run`` of one of Triton's jit functions, which obeys `recording` and `only_loading`.

    Args:
        kernel: the function.
        before: called first, by each launch.
    """
    run, names = kernel.run, kernel.arg_names
    defaults = {name: parameter.default for name, parameter in kernel.signature.parameters.items()}

    def run_and_note(*arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        before()
        loaded = _loaded.get()
        if loaded is not None:
            compiled = run(*arguments, grid=grid, warmup=True, **named)
            loaded.add(compiled)
            return compiled
        compiled = run(*arguments, grid=grid, warmup=warmup, **named)
        record = _record.get()
        if record is not None and not warmup:
            given = defaults | dict(zip(names, arguments, strict=False)) | named
            record.launches.append(WatchedLaunch(compiled, grid, tuple(given[name] for name in names)))
        return compiled

    return run_and_note


_record: ContextVar[Record | None] = ContextVar("record", default=None)
_loaded: ContextVar[set[Any] | None] = ContextVar("loaded", default=None)
_MEMORY = (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operators of torch's that do more than take memory or look at it in another way."""

    def __init__(self, record: Record) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._record = record
        self.sees = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.sees = True
        if not func.is_view and func.overloadpacket not in _MEMORY:
            self._record.is_whole = False
        return func(*args, **(kwargs or {}))
