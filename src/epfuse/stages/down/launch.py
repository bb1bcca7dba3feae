"""Launch the portable down kernel."""

from __future__ import annotations

import torch

from epfuse.numerics.mxfp8 import MXFP8
from epfuse.stages.down.kernel import down_kernel
from epfuse.stages.extent import extents
from epfuse.stages.grid import pieces
from epfuse.stages.portable_launch import constants, operands_of
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import GemmTile
from epfuse.target import target_of


def launch_down(
    y: torch.Tensor,
    w2: torch.Tensor | MXFP8,
    routes: RouteTable,
    topk_weights: torch.Tensor,
    tile: GemmTile,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the down weights, then the router weight in FP32, then round once.

    Args:
        y: ``[R, I]`` contiguous, from `launch_gate_up`; only rows of local routes count; bf16 with MXFP8 weights.
        w2: ``[L, H, I]``: dense in y's dtype, or MXFP8 (dequantised in registers; scales in ROWS layout).
        routes: RouteTable of this call.
        topk_weights: ``[T, K]`` float32 contiguous.
        tile: tile of the GEMM; its row block is ``routes.block_m``.
        out: ``[R, H]``, dtype of y; only rows of local routes are written, row r for route r.
        bias: ``[L, H]`` float32, added before the router weight multiplies; None for none.

    Returns:
        ``out``.

    Host syncs: none; graph-capturable.
    """
    intermediate = y.shape[1]
    hidden = w2.shape[1]
    grid = (routes.max_blocks * pieces(hidden, tile.block_n),)
    rows, router, results = extents(target_of(out.device), y, topk_weights, out)
    down_kernel[grid](
        rows,
        *operands_of(w2),
        bias,
        router,
        results,
        *routes.blocks,
        hidden,
        intermediate,
        **constants(routes, tile, intermediate),
    )
    return out
