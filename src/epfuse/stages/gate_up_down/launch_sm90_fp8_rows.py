"""Launch the GEMMs of many FP8 rows, both at once or each."""

from __future__ import annotations

import torch

from epfuse.config import Activation
from epfuse.errors import ConfigError
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.route.table import LoneTokens, RouteTable, where_stored
from epfuse.stages.tiles import Sm90RowsTile
from epfuse.target import compute_units
from epfuse.weights.row_fp8 import RowFP8

BLOCK_M = 128


def launch_both(
    x: FP8Rows,
    w13: RowFP8 | None,
    w2: RowFP8 | None,
    routes: RouteTable,
    topk_weights: torch.Tensor,
    activation: Activation,
    tile: Sm90RowsTile,
    y: FP8Rows,
    out: torch.Tensor,
    lone: LoneTokens | None = None,
    down_bias: torch.Tensor | None = None,
) -> None:
    """`launch_gate_up_sm90_fp8` into FP8 rows, then `launch_down_sm90_fp8`, in one launch.

    All rows lie packed in the route table's order; only as many as there are local routes are written, the first ones.
    The activation's results are rounded once, to E4M3 in the scales that ``y`` has. The same compiled kernel also runs
    one of the two GEMMs alone.

    Args:
        x: ``[R, H]`` from `launch_quantize_packed`.
        w13: ``[L, 2I, H]`` with rows in order GATE_UP; None to have only down run, on the rows that y has.
        w2: ``[L, H, I]`` with rows in order PLAIN; None to have only gate_up run.
        routes: RouteTable of this call, with arrivals, zeros: two or more a block. Like the weights not written by the
            launch right before this one, which may still be running when they are read.
        topk_weights: ``[T, K]`` float32 contiguous.
        activation: between the two GEMMs; no bias comes before it.
        tile: of both GEMMs.
        y: ``[R, I]`` in one group a row. Its scales are there (`Bounds`), its values are written.
        out: ``[R, H]`` BF16, written; may be x's memory if each row of x begins where that of out does.
        lone: from `launch_quantize_packed`: the rows of its tokens go to its ``out`` instead.
        down_bias: ``[L, H]`` float32, added before the router weight multiplies; None for none.

    Raises:
        ConfigError: the table has no blocks of 128 rows.

    Host syncs: none; graph-capturable.
    """
    _launch("both", x, w13, w2, routes, 0, topk_weights, activation, tile, y, out, lone, None, down_bias)


def launch_gate_up(
    x: FP8Rows,
    w13: RowFP8,
    routes: RouteTable,
    activation: Activation,
    tile: Sm90RowsTile,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """As `launch_gate_up_sm90_fp8` into BF16 ``out [R, I]``, in blocks of 128 rows; arguments as there."""
    _launch("gate_up", x, w13, None, routes, 0, w13.scales, activation, tile, out, out, None, bias, None)


def launch_down(
    y: FP8Rows,
    w2: RowFP8,
    routes: RouteTable,
    topk_weights: torch.Tensor,
    tile: Sm90RowsTile,
    out: torch.Tensor,
    lone: LoneTokens | None = None,
    bias: torch.Tensor | None = None,
    *,
    activation: Activation,
) -> None:
    """As `launch_down_sm90_fp8`, in blocks of 128 rows; arguments as there. The activation only names the kernel."""
    _launch("down", y, None, w2, routes, 1, topk_weights, activation, tile, y, out, lone, None, bias)


def _launch(
    gemms: str,
    x: FP8Rows,
    w13: RowFP8 | None,
    w2: RowFP8 | None,
    routes: RouteTable,
    first_counter: int,
    topk_weights: torch.Tensor,
    activation: Activation,
    tile: Sm90RowsTile,
    y: FP8Rows | torch.Tensor,
    out: torch.Tensor,
    lone: LoneTokens | None,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
) -> None:
    """The kernel; where one GEMM is left out its operands are the other's, which nothing reads."""
    from epfuse.stages.gate_up_down.kernel_sm90_fp8_rows import gate_up_down_sm90_fp8_rows_kernel
    from epfuse.stages.sm90_launch import block_rows, weight_lines

    if routes.block_m != BLOCK_M:
        raise ConfigError(f"the route table has blocks of {routes.block_m} rows; these kernels take {BLOCK_M}")
    up, down = w2 if w13 is None else w13, w13 if w2 is None else w2
    assert up is not None
    assert down is not None
    quantised = y if isinstance(y, FP8Rows) else None
    values = y.values if isinstance(y, FP8Rows) else y
    between = x if quantised is None else quantised
    gate_up_down_sm90_fp8_rows_kernel[(compute_units(out.device),)](
        block_rows(x, BLOCK_M),
        x.scales,
        weight_lines(up, tile.block_k),
        up.scales,
        gate_up_bias,
        values if quantised is None else values.view(torch.uint8),
        block_rows(between, BLOCK_M),
        between.scales,
        weight_lines(down, tile.block_k),
        down.scales,
        down_bias,
        topk_weights,
        out,
        *where_stored(lone),
        *routes.packed(first_counter),
        out.shape[1],
        values.shape[1],
        up.steps,
        down.steps,
        0 if w13 is None else up.panels,
        0 if w2 is None else down.panels,
        activation.parameters,
        GEMMS=gemms,
        GROUP_M=tile.group_m,
        STAGES=tile.num_stages,
        ACTIVATION=activation.kind,
        num_warps=tile.num_warps,
        launch_pdl=True,
    )
