"""Where a call's rows between the stages lie: in the caller's scratch, or in memory of their own."""

from __future__ import annotations

from typing import NamedTuple

import torch

from epfuse.families.family import LayerCall
from epfuse.operands import overlaps
from epfuse.scratch import ScratchSize
from epfuse.stages.grid import pieces
from epfuse.stages.quantize.rows import FP8Rows

_GROUP = 32
"""FP8 values that share a scale byte, at least: MXFP8's group. Block FP8's, of 128, takes less."""


class RowsBetween(NamedTuple):
    """Rows of a call whose activations keep their dtype.

    Attributes:
        y: ``[R, I]``, from gate_up to down.
        routed: ``[R, H]``, from down to combine; gathered rows before that.
        out_is_free: whether ``out`` may be written before down has finished; a caller's scratch may have its memory
            for y.
    """

    y: torch.Tensor
    routed: torch.Tensor
    out_is_free: bool


def rows_between(call: LayerCall) -> RowsBetween:
    """``y`` and ``routed`` of a call."""
    routes, shape, scratch = call.topk_ids.numel(), call.shape, call.scratch
    if scratch is None:
        new = call.hidden.new_empty
        return RowsBetween(new(routes, shape.intermediate), new(routes, shape.hidden), True)
    y = rows_in(scratch.y, routes, shape.intermediate)
    return RowsBetween(y, rows_in(scratch.routed, routes, shape.hidden), not overlaps(y, call.out))


def rows_in(buffer: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``[rows, columns]`` at the beginning of a contiguous buffer."""
    return buffer.view(-1)[: rows * columns].view(rows, columns)


def fp8_rows_in(buffer: torch.Tensor, rows: int, columns: int, group: int, dtype: torch.dtype) -> FP8Rows:
    """FP8 rows at the beginning of a contiguous buffer of any dtype: all values, and behind them all scales.

    Args:
        buffer: at least ``rows * (columns + scales a row)`` bytes.
        rows: how many.
        columns: values of a row.
        group: values that share a scale.
        dtype: float8_e4m3fn or float8_e4m3fnuz.

    Returns:
        ``[rows, columns]`` on the buffer's memory.
    """
    memory, values = buffer.view(-1).view(torch.uint8), rows * columns
    scales = rows * pieces(columns, group)
    return FP8Rows(
        memory[:values].view(dtype).view(rows, columns),
        memory[values : values + scales].view(rows, pieces(columns, group)),
        group,
    )


def fp8_scratch(tokens: int, top_k: int, hidden: int, intermediate: int) -> ScratchSize:
    """Scratch of the families that quantise: FP8 rows in y, BF16 rows before and after each GEMM in routed.

    Args:
        tokens: T.
        top_k: K.
        hidden: H.
        intermediate: I.

    Returns:
        In elements of BF16.
    """
    routes = tokens * top_k
    most = max(_fp8_bytes(tokens, hidden), _fp8_bytes(routes, intermediate))
    return ScratchSize(-(-most // 2), routes * max(2 * intermediate, hidden))  # two bytes an element


def _fp8_bytes(rows: int, columns: int) -> int:
    return rows * (columns + pieces(columns, _GROUP))
