"""Scratch: the memory of a call's intermediate rows, where the caller brings it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from epfuse.arguments import checks_enums, integer
from epfuse.config import Path
from epfuse.errors import DeviceError, DtypeError, LayoutError, ShapeError
from epfuse.operands import NOWHERE, Span, require_apart, require_plain, span

ALIGNMENT = 16
"""Bytes: the kernels load and store rows 16 bytes at a time."""
_GROUP = 32
"""FP8 values that share a scale byte, at least: MXFP8's group. Block FP8's, of 128, takes less."""


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


@checks_enums
def scratch_size(path: Path, tokens: int, top_k: int, hidden: int, intermediate: int) -> ScratchSize:
    """Elements that a call on ``path`` needs; ascending in ``tokens``.

    Args:
        path: what runs; AUTO takes what is enough for any path.
        tokens: T.
        top_k: K.
        hidden: H.
        intermediate: I.

    Raises:
        ConfigError: path is no `Path`, or a size is no integer or out of range (T may be 0).
    """
    tokens, top_k = integer("tokens", tokens), integer("top_k", top_k, least=1)
    hidden, intermediate = integer("hidden", hidden, least=1), integer("intermediate", intermediate, least=1)
    if path is Path.AUTO:
        every = [scratch_size(each, tokens, top_k, hidden, intermediate) for each in Path if each is not Path.AUTO]
        return ScratchSize(max(size.y for size in every), max(size.routed for size in every))
    routes = tokens * top_k
    if path is Path.REFERENCE:
        return ScratchSize(0, 0)
    if path in (Path.BF16, Path.W8A16):
        return ScratchSize(routes * intermediate, routes * hidden)
    # two bytes an element: activations are BF16 there
    most = max(_fp8_bytes(tokens, hidden), _fp8_bytes(routes, intermediate))
    return ScratchSize(-(-most // 2), routes * max(2 * intermediate, hidden))


def _fp8_bytes(rows: int, columns: int) -> int:
    return rows * (columns + -(-columns // _GROUP))


def rows_in(buffer: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``[rows, columns]`` at the beginning of a contiguous buffer."""
    return buffer.view(-1)[: rows * columns].view(rows, columns)


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
