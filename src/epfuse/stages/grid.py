"""Sizes of a launch: whole pieces and powers of two.

Triton has both as functions that its kernels may call too; from the host such a call takes microseconds, and a layer
makes eight.
"""

from __future__ import annotations


def pieces(extent: int, size: int) -> int:
    """How many pieces of ``size`` cover ``extent``."""
    return -(-extent // size)


def power_of_two(extent: int) -> int:
    """The least power of two that is at least ``extent``, which is 1 or more."""
    return 1 << (extent - 1).bit_length()
