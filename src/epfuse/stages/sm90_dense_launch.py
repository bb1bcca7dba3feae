"""Dense weights as the copy engine takes them for Hopper's persistent kernel."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, MutableMapping

import torch
from torch.utils.weak import WeakIdKeyDictionary
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from epfuse.errors import LayoutError
from epfuse.stages.extent import ALIGNMENT
from epfuse.weights.panels import PANEL_ROWS

STEP = 64
"""Columns of a step: a line of 128 bytes, the copy engine's widest swizzle."""
RUN = 8
"""Adjacent gate rows, or up rows, of a panel."""

_Described = MutableMapping[torch.Tensor, tuple[torch.Size, TensorDescriptor]]
_gate_up: _Described = WeakIdKeyDictionary()
_down: _Described = WeakIdKeyDictionary()
_layout = functools.cache(lambda rank: gl.NVMMASharedLayout(2 * STEP, 16, rank))


def gate_up_panels(w13: torch.Tensor) -> TensorDescriptor:
    """``w13 [L, 2I, H]`` as ``[runs, gate or up, 8, H]``, copied a panel of 64 rows and 64 columns at a time.

    A panel is 8 gate rows and their 8 up rows in turn, which lie I rows apart. Checked once in the tensor's life.

    Raises:
        LayoutError: ``w13`` begins at no multiple of 16 bytes.
    """
    return _described(_gate_up, w13, _of_gate_up)


def down_panels(w2: torch.Tensor) -> TensorDescriptor:
    """``w2 [L, H, I]`` as ``[L * H, I]``, copied 64 rows and columns at a time; checked once in the tensor's life.

    Raises:
        LayoutError: ``w2`` begins at no multiple of 16 bytes.
    """
    return _described(_down, w2, _of_down)


def _described(
    known: _Described, weights: torch.Tensor, describe: Callable[[torch.Tensor], TensorDescriptor]
) -> TensorDescriptor:
    if weights.data_ptr() % ALIGNMENT:
        raise LayoutError(
            f"dense weights begin at {weights.data_ptr():#x}; Hopper's copy engine takes them from multiples of"
            f" {ALIGNMENT} bytes (call .clone() at load)"
        )
    size, checked = known.get(weights, (None, None))
    if checked is None or size != weights.shape:
        checked = describe(weights.detach())
        checked.base = None  # it would hold memory that a parameter gives up, as in `model.to("cpu")`
        known[weights] = weights.shape, checked
    found = copy.copy(checked)
    found.base = weights.detach()
    return found


def _of_gate_up(w13: torch.Tensor) -> TensorDescriptor:
    experts, rows, hidden = w13.shape
    half = rows // 2
    runs = (experts * rows - half) // RUN  # the last expert's second half is reached by its first half's runs
    strides = [RUN * hidden, half * hidden, hidden, 1]
    box = [PANEL_ROWS // (2 * RUN), 2, RUN, STEP]
    return TensorDescriptor(w13, [runs, 2, RUN, hidden], strides, box, _layout(4))


def _of_down(w2: torch.Tensor) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(w2.flatten(0, 1), [PANEL_ROWS, STEP], _layout(2))
