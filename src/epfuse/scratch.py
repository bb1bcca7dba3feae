"""Scratch: the memory of a call's intermediate rows, where the caller brings it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from epfuse.errors import DeviceError, DtypeError, LayoutError, ShapeError
from epfuse.operands import NOWHERE, Span, require_apart, require_plain, span
from epfuse.stages.extent import ALIGNMENT


@dataclass(frozen=True)
class ScratchSize:
    """What a call needs at least, in elements of the activations' dtype.

    Attributes:
        y: of `Scratch.y`.
        routed: of `Scratch.routed`.
    """

    y: int
    routed: int


@dataclass(frozen=True)
class Scratch:
    """Two buffers that a call uses in place of allocating; what is in them before does not matter, after is undefined.

    Both are contiguous, of any shape, with the dtype and device of ``hidden``, and begin at a multiple of 16 bytes. The
    next call on the same stream may use them again.

    Args:
        y: rows between the two GEMMs, ``[R, I]`` in BF16 (or ``hidden``'s dtype), in FP8 on the paths that quantise,
            where they follow the quantised ``hidden`` in the same memory (with weights in ROW_FP8 its scales alone).
            Of the call's tensors it **may overlap** ``out`` alone, which then is not written before y is dead. Where it
            does not, some of ``out`` is written earlier, which is faster.
        routed: a row per route, ``[R, H]``; before that, on the paths that quantise, ``[R, 2I]`` (with weights in
            ROW_FP8 the quantised rows, and ``[R, I]``). Overlaps neither ``y`` nor any tensor of the call.

    Raises:
        ConfigError, LayoutError: one of them is no plain tensor.
    """

    y: torch.Tensor
    routed: torch.Tensor

    def __post_init__(self) -> None:
        require_plain("scratch.y", self.y)
        require_plain("scratch.routed", self.routed)


def check_scratch(
    scratch: Scratch, size: ScratchSize, hidden: torch.Tensor, out: torch.Tensor, read: Sequence[tuple[str, Span]]
) -> None:
    """Raise the error that names the first buffer that does not fit. Reads no tensor's data.

    Args:
        scratch: the caller's.
        size: what the call needs.
        hidden: ``[T, H]``.
        out: ``[T, H]``.
        read: where the tensors lie that the call reads, hidden among them, each with its name.

    Raises:
        DtypeError, DeviceError, LayoutError, ShapeError: as named.
    """
    for name, needed in (("y", size.y), ("routed", size.routed)):
        tensor: torch.Tensor = getattr(scratch, name)
        if tensor.dtype != hidden.dtype:
            raise DtypeError(f"scratch.{name} has dtype {tensor.dtype}; it must be hidden's dtype {hidden.dtype}")
        if tensor.device != hidden.device:
            raise DeviceError(f"scratch.{name} is on {tensor.device}; it must be on {hidden.device}, as hidden is")
        if not tensor.is_contiguous():
            raise LayoutError(f"scratch.{name} has strides {tensor.stride()}; it must be contiguous")
        if tensor.numel() < needed:
            raise ShapeError(
                f"scratch.{name} has {tensor.numel()} elements; this call needs {needed} (epfuse.scratch_size)"
            )
        if tensor.data_ptr() % ALIGNMENT:
            raise LayoutError(f"scratch.{name} begins at an address that is not a multiple of {ALIGNMENT} bytes")
    y, routed = (
        (begin, begin + needed * hidden.element_size()) if begin else NOWHERE
        for begin, needed in ((scratch.y.data_ptr(), size.y), (scratch.routed.data_ptr(), size.routed))
    )
    require_apart("scratch.y", y, read)
    require_apart("scratch.routed", routed, [*read, ("out", span(out)), ("scratch.y", y)])
