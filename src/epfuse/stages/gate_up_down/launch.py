"""Launch both GEMMs at once."""

from __future__ import annotations

import torch

from epfuse.config import SwiGLUOAI
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import Sm90PersistentTile
from epfuse.target import compute_units
from epfuse.weights.fragment import FragmentMXFP8


def launch_gate_up_down(
    x: torch.Tensor,
    w13: FragmentMXFP8,
    w2: FragmentMXFP8,
    routes: RouteTable,
    topk_weights: torch.Tensor | None,
    activation: SwiGLUOAI,
    tile: Sm90PersistentTile,
    y: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`launch_gate_up`, then `launch_down`, both in one tile and without the gap between two kernels.

    Args:
        x: ``[R, H]`` BF16 from `launch_gather`.
        w13: ``[L, 2I, H]`` with rows in order GATE_UP.
        w2: ``[L, H, I]`` with rows in order PLAIN.
        routes: RouteTable of this call, with arrivals: two or more a block.
        topk_weights: ``[T, K]`` float32 contiguous; None leaves the weighting to combine.
        activation: its parameters.
        tile: of both GEMMs.
        y: ``[R, I]`` for the rows between the two. Allocated if None.
        out: ``[R, H]``; the rows lie packed as those of x do. May be x. Allocated if None.

    Returns:
        ``out``.

    Host syncs: none; graph-capturable.
    """
    from epfuse.stages.gate_up_down.kernel_sm90 import gate_up_down_sm90_kernel
    from epfuse.stages.sm90_launch import constants, operand_of, row_parts, weight_lines

    assert routes.arrivals is not None
    intermediate, hidden = w13.rows // 2, w2.rows
    if y is None:
        y = x.new_empty(routes.num_routes, intermediate)
    if out is None:
        out = x.new_empty(routes.num_routes, hidden)
    up, down = operand_of(w13, w13.rows), operand_of(w2, hidden)
    gate_up_down_sm90_kernel[(compute_units(x.device),)](
        *row_parts(x, routes, tile.block_k),
        weight_lines(w13, tile.block_k),
        up.scales,
        y,
        *row_parts(y, routes, tile.block_k),
        weight_lines(w2, tile.block_k),
        down.scales,
        topk_weights,
        out,
        routes.sorted_routes,
        routes.block_expert,
        routes.block_row,
        routes.num_padded,
        routes.arrivals,
        routes.num_routes,
        hidden,
        intermediate,
        up.columns,
        down.columns,
        up.panels,
        down.panels,
        activation.alpha,
        activation.beta,
        activation.limit,
        PARTS=tile.parts,
        **constants(routes, tile),
    )
    return out
