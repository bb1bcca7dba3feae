"""Launch the gate_up kernel of Hopper's FP8 rows."""

from __future__ import annotations

import torch

from epfuse.config import Activation
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import Sm90PersistentTile
from epfuse.target import compute_units
from epfuse.weights.row_fp8 import RowFP8


def launch_gate_up_sm90_fp8(
    x: FP8Rows,
    w13: RowFP8,
    routes: RouteTable,
    activation: Activation,
    tile: Sm90PersistentTile,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply gate and up weights to packed FP8 rows by native FP8 products, and the activation.

    As on the paths with BF16 rows, accumulators are rounded before the activation and its results after it.

    Args:
        x: ``[R, H]`` from `launch_quantize_packed`.
        w13: ``[L, 2I, H]`` with rows in order GATE_UP.
        routes: RouteTable of this call, with arrivals, zeros: the first one is used. Like w13 not written by the launch
            right before this one, which may still be running when they are read.
        activation: between the two GEMMs.
        tile: of the GEMM; block_k is 128, parts 1.
        out: ``[R, I]`` BF16, packed; only as many rows as there are local routes are written, the first ones.
        bias: ``[L, 2I]`` float32, gate before up, added before the activation; None for none.

    Returns:
        ``out``.

    Raises:
        ConfigError: the tile has another block_k or more parts.

    Host syncs: none; graph-capturable.
    """
    from epfuse.stages.gate_up.kernel_sm90_fp8 import gate_up_sm90_fp8_kernel
    from epfuse.stages.sm90_launch import check_fp8_tile, constants, row_parts, weight_lines

    check_fp8_tile(tile)
    head, rest = tile.rows_of(routes.block_m)
    gate_up_sm90_fp8_kernel[(compute_units(out.device),)](
        *row_parts(x.values, head, rest, tile.block_k),
        x.scales,
        weight_lines(w13, tile.block_k),
        w13.scales,
        bias,
        out,
        *routes.packed(),
        out.shape[1],
        w13.steps,
        w13.panels,
        activation.parameters,
        HEAD=head,
        CONSUMERS=tile.consumers,
        ACTIVATION=activation.kind,
        **constants(routes, tile),
    )
    return out
