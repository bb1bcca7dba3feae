"""Row blocks that are worth trying, and orders in which blocks are walked: what the families' search spaces share."""

from __future__ import annotations

LARGEST = 128
"""Rows of the largest block that is one power of two."""


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


def groups(block_m: int) -> tuple[int, ...]:
    """Values of group_m: where an expert has few blocks, all of them share a column of weights anyway."""
    return (0,) if block_m < 64 else (0, 4, 8)
