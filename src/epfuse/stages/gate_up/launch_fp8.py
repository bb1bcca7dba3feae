"""Launch the gate_up kernel of the FP8 paths."""

from __future__ import annotations

import torch

from epfuse.numerics.mxfp8 import MXFP8
from epfuse.stages.extent import extents
from epfuse.stages.gate_up.kernel_fp8 import gate_up_fp8_kernel
from epfuse.stages.grid import pieces
from epfuse.stages.portable_launch import constants
from epfuse.stages.quantize.rows import FP8Rows, require_alike
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import GemmTile
from epfuse.target import target_of
from epfuse.weights.block_fp8 import BlockFP8, scale_block


def launch_gate_up_fp8(
    x: FP8Rows,
    w13: MXFP8 | BlockFP8,
    routes: RouteTable,
    top_k: int,
    tile: GemmTile,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    inputs: int = 2,
) -> torch.Tensor:
    """Gather routed rows and apply gate and up weights, a native FP8 dot per group of values.

    Args:
        x: ``[T, H]`` in the groups of w13: 32 beside MXFP8, 128 beside block FP8; the same E4M3 as w13.
        w13: ``[L, 2I, H]``, or ``[L, I, H]`` without a gate; MXFP8 with scales in ROWS layout, or block FP8.
        routes: RouteTable of this call; row r reads token ``r // K``.
        top_k: K.
        tile: tile of the GEMM; its row block is ``routes.block_m``, its block_k a multiple of the group.
        out: ``[R, 2I]``, or ``[R, I]``; only rows of local routes are written. Accumulators are rounded to its dtype
            before the activation.
        bias: ``[L, 2I]`` or ``[L, I]`` float32, added to the products; None for none.
        inputs: rows of w13 for one value of the activation (`Activation.inputs`).

    Returns:
        ``out``.

    Raises:
        DtypeError, ShapeError: x is in another E4M3, or in other groups, than w13.

    Host syncs: none; graph-capturable.
    """
    require_alike("x", x, w13)
    hidden, outputs = x.values.shape[1], w13.shape[1]
    grid = (routes.max_blocks * pieces(outputs, tile.block_n),)
    values, scales, results = extents(target_of(out.device), x.values, x.scales, out)
    gate_up_fp8_kernel[grid](
        values,
        scales,
        w13.values,
        w13.scales,
        bias,
        results,
        *routes.blocks,
        hidden,
        outputs // inputs,
        x.scales.shape[1],
        K=top_k,
        GROUP=x.group,
        SCALE_ROWS=scale_block(w13)[0],
        INPUTS=inputs,
        **constants(routes, tile, hidden),
    )
    return out
