"""Launch the gate_up kernel of Hopper's FP8 rows and block FP8 weights."""

from __future__ import annotations

import torch

from epfuse.config import Activation
from epfuse.stages.grid import pieces
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import Sm90BlockTile
from epfuse.target import compute_units
from epfuse.weights.block_fp8 import BLOCK, BlockFP8


def launch_gate_up_sm90_block_fp8(
    x: FP8Rows,
    w13: BlockFP8,
    routes: RouteTable,
    activation: Activation,
    tile: Sm90BlockTile,
    out: FP8Rows,
    bias: torch.Tensor | None = None,
) -> FP8Rows:
    """Apply gate and up weights to packed FP8 rows by native FP8 products, then the activation, and quantise.

    The sums are rounded before the activation, its results once, to E4M3.

    Args:
        x: ``[R, H]`` in groups of 128, from `launch_quantize_packed`.
        w13: ``[L, 2I, H]``, I a multiple of 128 and H of 16.
        routes: RouteTable of this call, with arrivals, zeros: the first one is used. Like w13 not written by the launch
            right before this one, which may still be running when they are read.
        activation: between the two GEMMs, with a gate.
        tile: of the GEMM, block_n 256.
        out: ``[R, I]`` in groups of 128, packed; only as many rows as there are local routes are written, the first
            ones.
        bias: ``[L, 2I]`` float32, gate before up, added before the activation; None for none.

    Returns:
        ``out``.

    Host syncs: none; graph-capturable; bitwise repeatable.
    """
    from epfuse.stages.gate_up.kernel_sm90_block_fp8 import gate_up_sm90_block_fp8_kernel
    from epfuse.stages.sm90_launch import block_constants, block_rows, weight_blocks

    assert tile.blocks == 2
    intermediate = w13.values.shape[1] // 2
    gate_up_sm90_block_fp8_kernel[(compute_units(out.values.device),)](
        block_rows(x, routes.block_m),
        x.scales,
        weight_blocks(w13),
        w13.scales,
        bias,
        out.values.view(torch.uint8),
        out.scales,
        *routes.packed(),
        intermediate,
        pieces(w13.values.shape[2], BLOCK),
        activation.parameters,
        ACTIVATION=activation.kind,
        **block_constants(routes, tile),
    )
    return out
