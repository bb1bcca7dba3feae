"""Launch both GEMMs at once."""

from __future__ import annotations

import torch

from epfuse.config import Activation
from epfuse.stages.route.table import LoneTokens, RouteTable, where_stored
from epfuse.stages.tiles import Sm90PersistentTile
from epfuse.target import compute_units
from epfuse.weights.fragment import FragmentMXFP8


def launch_gate_up_down(
    x: torch.Tensor,
    w13: FragmentMXFP8 | None,
    w2: FragmentMXFP8 | None,
    routes: RouteTable,
    topk_weights: torch.Tensor,
    activation: Activation,
    tile: Sm90PersistentTile,
    y: torch.Tensor,
    out: torch.Tensor,
    lone: LoneTokens | None = None,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> None:
    """`launch_gate_up`, then `launch_down`, both in one tile and without the gap between two kernels.

    All rows lie packed in the route table's order; only as many as there are local routes are written, the first ones.
    The same compiled kernel also runs one of the two alone.

    Args:
        x: ``[R, H]`` BF16 from `launch_gather`.
        w13: ``[L, 2I, H]`` with rows in order GATE_UP; None to have only down run, on the rows that y has.
        w2: ``[L, H, I]`` with rows in order PLAIN; None to have only gate_up run.
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

    Host syncs: none; graph-capturable.
    """
    from epfuse.stages.gate_up_down.kernel_sm90 import gate_up_down_sm90_kernel
    from epfuse.stages.sm90_launch import constants, operand_of, row_parts, weight_lines

    up_weights = w2 if w13 is None else w13
    down_weights = w13 if w2 is None else w2
    assert up_weights is not None
    assert down_weights is not None
    up, down = (operand_of(w, w.rows, tile.block_k) for w in (up_weights, down_weights))
    head, rest = tile.rows_of(routes.block_m)
    gate_up_down_sm90_kernel[(compute_units(x.device),)](
        *row_parts(x, head, rest, tile.block_k),
        weight_lines(up_weights, tile.block_k),
        up.scales,
        gate_up_bias,
        y,
        *row_parts(y, head, rest, tile.block_k),
        weight_lines(down_weights, tile.block_k),
        down.scales,
        down_bias,
        topk_weights,
        out,
        *where_stored(lone),
        *routes.packed(),
        out.shape[1],
        y.shape[1],
        up.columns,
        down.columns,
        0 if w13 is None else up.panels,
        0 if w2 is None else down.panels,
        activation.parameters,
        HEAD=head,
        CONSUMERS=tile.consumers,
        PARTS=tile.parts,
        ACTIVATION=activation.kind,
        **constants(routes, tile),
    )
