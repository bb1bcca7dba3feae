"""What Hopper's tensor copy engine needs to know of fragment-ordered weights."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from epfuse.weights.fragment import PANEL_ROWS, FragmentMXFP8

LINE = 128
"""Bytes of a line: the widest swizzle."""


def weight_lines(weights: FragmentMXFP8, block_k: int) -> TensorDescriptor:
    """The codes as lines of 128 bytes, copied a panel and ``block_k`` at a time."""
    lines = weights.codes.view(-1, LINE)
    box = [PANEL_ROWS * block_k // LINE, LINE]
    return TensorDescriptor.from_tensor(lines, box, gl.NVMMASharedLayout(LINE, 8, 2))
