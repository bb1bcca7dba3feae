"""Weights in panels of rows, as Hopper's tensor cores multiply with them: what every order of the codes shares."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch

from epfuse.arguments import checks_enums
from epfuse.errors import DtypeError, LayoutError
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.numerics.stack import ExpertStack
from epfuse.stages.extent import ALIGNMENT
from epfuse.weights.projections import Projections

PANEL_ROWS = 64
STEP_K = 128


class RowOrder(enum.Enum):
    """Which source row each packed row is."""

    PLAIN = "plain"
    """Rows in their own order."""
    GATE_UP = "gate_up"
    """Of ``[gate; up]``: 8 gate rows, then their 8 up rows, so that a thread's accumulators hold pairs."""


@checks_enums
@dataclass(frozen=True)
class PanelStack(ExpertStack):
    """A stack of matrices in panels of 64 rows, K padded to whole steps of 128.

    Attributes:
        codes: ``[L, panels, ..]``.
        scales: ``[L, ..]``.
        rows: N, rows of a matrix before padding to whole panels.
        columns: K before padding to whole steps of 128.
        order: how the rows are ordered.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    rows: int
    columns: int
    order: RowOrder

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, N, K), without padding."""
        return self.codes.shape[0], self.rows, self.columns

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Codes, then scales."""
        return self.codes, self.scales

    @property
    def panels(self) -> int:
        return self.codes.shape[1]


P = TypeVar("P", bound=PanelStack)


@dataclass(frozen=True)
class PanelProjections(Projections[P]):
    """Both projections in panels: rows of w13 in order GATE_UP, of w2 in order PLAIN."""

    def check(self) -> None:
        """The orders that kernels read."""
        if (self.w13.order, self.w2.order) != (RowOrder.GATE_UP, RowOrder.PLAIN):
            raise LayoutError(
                f"{self.form.value} has rows in the orders {self.w13.order.name} and {self.w2.order.name}; they must"
                " be GATE_UP and PLAIN"
            )

    @classmethod
    def rebuilt(cls, tensors: Sequence[torch.Tensor], hidden: int, intermediate: int) -> Self:
        """As `Projections.rebuilt`; the tensors don't tell what is padding."""
        half = len(tensors) // 2
        (up, up_scales, *up_rest), (down, down_scales, *down_rest) = tensors[:half], tensors[half:]
        w13 = cls.stack(up, up_scales, 2 * intermediate, hidden, RowOrder.GATE_UP, *up_rest)
        return cls(w13, cls.stack(down, down_scales, hidden, intermediate, RowOrder.PLAIN, *down_rest))


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether a tensor begins where the kernels' copies can, and where its bytes can be viewed as wider numbers."""
    begins = tensor.data_ptr(), tensor.storage_offset() * tensor.element_size()
    return not any(begin % ALIGNMENT for begin in begins)


def require_fn(weights: MXFP8) -> None:
    """Refuse codes that are not E4M3FN: in gfx942's format the same bytes mean other numbers.

    Raises:
        DtypeError: as said.
    """
    if weights.values.dtype != torch.float8_e4m3fn:
        raise DtypeError(
            f"weights have codes in {weights.values.dtype}; Hopper's orders are made from float8_e4m3fn: load the"
            " checkpoint again"
        )


@checks_enums
def source_rows(rows: int, order: RowOrder) -> torch.Tensor:
    """The source row of each packed row.

    Args:
        rows: N of the matrix: 2I for GATE_UP, an even number.
        order: how the packed rows are ordered.

    Returns:
        ``[panels * 64]`` int64 on the CPU, -1 where it is padding.
    """
    if order is RowOrder.PLAIN:
        packed = torch.arange(-(-rows // PANEL_ROWS) * PANEL_ROWS, device="cpu")
        return torch.where(packed < rows, packed, -1)
    outputs = rows // 2
    gate = torch.arange(-(-outputs // (PANEL_ROWS // 2)) * PANEL_ROWS // 2, device="cpu").view(-1, 1, 8)
    return torch.where(gate < outputs, torch.cat([gate, gate + outputs], dim=1), -1).reshape(-1)


def take_rows(matrices: torch.Tensor, source: torch.Tensor, columns: int, fill: int) -> torch.Tensor:
    """Rows of matrices in another order, padded.

    Args:
        matrices: ``[.., N, C]``, any dtype.
        source: ``[M]`` int64, from `source_rows`, on the same device: which row of a matrix each row of the result is,
            every row once, -1 for padding.
        columns: of the result, at least C.
        fill: what padding rows hold, and every row past the matrix's C columns.

    Returns:
        ``[.., M, columns]``, dtype and device of ``matrices``, new memory.

    Host syncs: none; a mask as an index would be one.
    """
    taken = matrices.index_select(-2, source.clamp(min=0))
    if source.numel() != matrices.shape[-2]:
        taken.masked_fill_((source < 0)[:, None], fill)
    more = columns - matrices.shape[-1]
    return torch.nn.functional.pad(taken, (0, more), value=fill) if more else taken
