"""The tensors that callers bring: each one plain, and none of them where another one is written."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.autograd import forward_ad

from epfuse.errors import ConfigError, LayoutError

Span = tuple[int, int]
"""The addresses of a contiguous tensor's first byte and of the one after its last; equal where it has no memory."""

NOWHERE: Span = (0, 0)


def require_plain(name: str, value: object) -> None:
    """Refuse what is no dense tensor with its numbers in its own memory. Reads no data.

    Args:
        name: what an error calls the argument.
        value: what was given; on the meta device too, where a call has no data by intent (`epfuse.aot`).

    Raises:
        ConfigError: not a tensor, or one that stands for others (a DTensor, a FakeTensor, a tensor of torch.func's
            transforms), or has a tangent, which would be lost.
        LayoutError: sparse or nested, or a view that negates or conjugates when it is read.
    """
    if not isinstance(value, torch.Tensor):
        raise ConfigError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor")
    if torch.compiler.is_compiling():  # what is traced stands for other tensors; they are asked when the graph runs
        return
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        kind = type(value).__name__
        raise ConfigError(f"{name} is a {kind}, which has no memory of its own; it must be a plain tensor")
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise ConfigError(f"{name} is traced by torch.func (vmap, grad, jvp, ..); it must be a plain tensor")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:  # type: ignore[no-untyped-call]
        raise ConfigError(f"{name} has a tangent; there is no forward-mode derivative: call without it")
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise LayoutError(f"{name} is a {layout} tensor; it must be a plain one (dense, strided)")
    if value.is_neg() or value.is_conj():
        raise LayoutError(f"{name} is negated or conjugated when it is read; make it plain with .clone()")


def is_integer(ids: torch.Tensor) -> bool:
    """Whether they can number experts."""
    return not (ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool)


def wide_ids(ids: torch.Tensor) -> torch.Tensor:
    """Integers in a dtype that `fused_experts` takes, which a router's may be too narrow for; others as they are.

    Args:
        ids: ``[T, K]``.
    """
    return ids if ids.dtype in (torch.int32, torch.int64) or not is_integer(ids) else ids.to(torch.int64)


def span(tensor: torch.Tensor) -> Span:
    """Where a contiguous tensor lies."""
    begin = tensor.data_ptr()
    return (begin, begin + tensor.nbytes) if begin else NOWHERE


def overlaps(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two contiguous tensors of one device share a byte; those without memory (meta) share none."""
    (begin, end), (other, last) = span(first), span(second)
    return max(begin, other) < min(end, last)


def require_apart(name: str, written: Span, others: Iterable[tuple[str, Span]]) -> None:
    """Refuse memory that is written while something else lies in it.

    Args:
        name: what an error calls the memory.
        written: where it is.
        others: what must stay as it is, each with its name.

    Raises:
        LayoutError: the two share a byte.
    """
    begin, end = written
    for what, (first, last) in others:
        if begin < last and first < end and begin < end and first < last:  # neither is empty
            raise LayoutError(f"{name} shares memory with {what}; it must be memory of its own")
