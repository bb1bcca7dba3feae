"""Launch both GEMMs at once, on dense weights."""

from __future__ import annotations

import torch

from epfuse.config import Activation
from epfuse.stages.grid import pieces
from epfuse.stages.route.table import LoneTokens, RouteTable, where_stored
from epfuse.stages.tiles import Sm90DenseTile
from epfuse.target import compute_units


def launch_gate_up_down_dense(
    x: torch.Tensor,
    w13: torch.Tensor | None,
    w2: torch.Tensor | None,
    routes: RouteTable,
    topk_weights: torch.Tensor,
    activation: Activation,
    tile: Sm90DenseTile,
    y: torch.Tensor,
    out: torch.Tensor,
    lone: LoneTokens | None = None,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> None:
    """`launch_gate_up_down` for dense weights; H and I are multiples of 16.

    Args:
        x: ``[R, H]`` BF16 from `launch_gather`.
        w13: ``[L, 2I, H]`` BF16, contiguous, gate rows before up rows; None to have only down run, on y's rows.
        w2: ``[L, H, I]`` BF16, contiguous; None to have only gate_up run.
        routes: RouteTable of this call, with arrivals, zeros: two or more a block. Like the weights not written by the
            launch right before this one, which may still be running when they are read.
        topk_weights: ``[T, K]`` float32 contiguous.
        activation: between the two GEMMs.
        tile: of both GEMMs.
        y: ``[R, I]`` BF16, written: the rows between the two.
        out: ``[R, H]`` BF16, written; may be x.
        lone: from `launch_gather`: the rows of its tokens go to its ``out`` instead.
        gate_up_bias: ``[L, 2I]`` float32, gate before up, added before the activation; None for none.
        down_bias: ``[L, H]`` float32, added before the router weight multiplies; None for none.

    Raises:
        LayoutError: weights begin at no multiple of 16 bytes.

    Host syncs: none; graph-capturable.
    """
    from epfuse.stages.gate_up_down.kernel_sm90_dense import gate_up_down_sm90_dense_kernel
    from epfuse.stages.sm90_dense_launch import RUN, STEP, down_panels, gate_up_panels
    from epfuse.stages.sm90_launch import constants, row_parts

    up_weights = w2 if w13 is None else w13
    down_weights = w13 if w2 is None else w2
    assert up_weights is not None
    assert down_weights is not None
    hidden, intermediate = out.shape[1], y.shape[1]
    head, rest = tile.rows_of(routes.block_m)
    gate_up_down_sm90_dense_kernel[(compute_units(x.device),)](
        *row_parts(x, head, rest, STEP),
        gate_up_panels(up_weights),
        gate_up_bias,
        y,
        *row_parts(y, head, rest, STEP),
        down_panels(down_weights),
        down_bias,
        topk_weights,
        out,
        *where_stored(lone),
        *routes.packed(),
        hidden,
        intermediate,
        2 * intermediate // RUN,
        pieces(hidden, STEP),
        pieces(intermediate, STEP),
        0 if w13 is None else pieces(2 * intermediate, tile.block_n),
        0 if w2 is None else pieces(hidden, tile.block_n),
        activation.parameters,
        HEAD=head,
        BLOCK_N=tile.block_n,
        CONSUMERS=tile.consumers_of(routes.block_m),
        ACTIVATION=activation.kind,
        **constants(routes, tile),
    )
