"""How a checkpoint stores the experts' matrices, and how they become w13 and w2 as kernels read them."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from epfuse.arguments import checks_enums
from epfuse.errors import ShapeError

if TYPE_CHECKING:  # a family's entry names a layout, and reading a config.json loads no torch
    import torch


class GateUpRows(enum.Enum):
    """In which order the gate and the up rows of an expert lie."""

    HALVES = "halves"
    """All gate rows, then all up rows: ours."""
    ALTERNATING = "alternating"
    """The first gate row, the first up row, the second gate row, ..: gpt-oss."""


class MatrixOrder(enum.Enum):
    """Which way round a matrix lies."""

    ROWS = "rows"
    """``[L, outputs, inputs]``, a row for each output: ours, and torch.nn.Linear's."""
    COLUMNS = "columns"
    """``[L, inputs, outputs]``, transposed: gpt-oss and Aria."""


@checks_enums
@dataclass(frozen=True)
class WeightLayout:
    """How both projections of a layer are stored.

    Args:
        gate_up: order of the gate and up rows, and of their biases.
        matrices: which way round both projections lie.
    """

    gate_up: GateUpRows = GateUpRows.HALVES
    matrices: MatrixOrder = MatrixOrder.ROWS

    @property
    def is_ours(self) -> bool:
        """Whether it is what kernels read, so that nothing need be copied."""
        return self == OURS

    def rows(self, stored: torch.Tensor) -> torch.Tensor:
        """A projection as ``[L, outputs, inputs]``: itself where it lies so, else new memory.

        Args:
            stored: three-dimensional, any dtype.
        """
        return stored if self.matrices is MatrixOrder.ROWS else stored.transpose(1, 2).contiguous()

    def in_halves(self, rows: torch.Tensor) -> torch.Tensor:
        """What lies along the gate and up rows, gate first: weights, their scales or biases.

        Args:
            rows: ``[L, 2I]`` or ``[L, 2I, ..]`` in this layout's order, any dtype.

        Returns:
            Itself where the order is HALVES, else new memory of the same shape.

        Raises:
            ShapeError: the rows are odd in number, and alternate.
        """
        if self.gate_up is GateUpRows.HALVES:
            return rows
        if rows.shape[1] % 2:
            raise ShapeError(f"gate_up has {rows.shape[1]} rows; gate and up rows that alternate are even in number")
        pairs = rows.reshape(rows.shape[0], -1, 2, *rows.shape[2:])
        return pairs.transpose(1, 2).reshape(rows.shape)


OURS = WeightLayout()
"""Gate rows first, a row for each output."""
