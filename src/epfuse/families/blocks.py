"""Row blocks that are worth trying, and orders in which blocks are walked: what the families' search spaces share."""

from __future__ import annotations

from collections.abc import Sequence

LARGEST = 128
"""Rows of the largest block that is one power of two."""
LARGEST_TWO_PARTS = 144
"""From here on the rows of an expert take several blocks of two parts, of this size or larger."""
HEADS = {64: (0, 32), 96: (0, 32), 128: (0, 64)}
"""Heads of these row blocks: with a small one they cost little where experts have few rows."""


def powers_of_two(rows: float, least: int) -> list[int]:
    """Row blocks for ``rows`` expected rows per expert: the first power of two that holds them, and its neighbours.

    Where even the least block is mostly padding there is no other.
    """
    if rows <= least / 4:
        return [least]
    fitting = least
    while fitting < min(rows, LARGEST):
        fitting *= 2
    return [size for size in (fitting // 2, fitting, fitting * 2) if least <= size <= LARGEST]


def two_parts(rows: float, sizes: Sequence[int]) -> list[int]:
    """What of ``sizes`` holds ``rows`` expected rows in one block and is less than half padding, or several.

    With a small head padding costs little, so up to two thirds. More rows than LARGEST_TWO_PARTS take several blocks,
    of any size from there on; below the smallest, persistent tiles are not worth trying.

    Args:
        rows: expected rows per expert.
        sizes: of row blocks of two parts, ascending.
    """
    least = min(rows, LARGEST_TWO_PARTS)
    return [size for size in sizes if least <= size and (size < 2 * rows or (size in HEADS and size <= 3 * rows))]


def groups(block_m: int) -> tuple[int, ...]:
    """Values of group_m: where an expert has few blocks, all of them share a column of weights anyway."""
    return (0,) if block_m < 64 else (0, 4, 8)
