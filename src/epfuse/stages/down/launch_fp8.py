"""Launch the down kernel of the FP8 paths."""

from __future__ import annotations

import torch

from epfuse.arguments import checks_enums
from epfuse.config import Combine
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.stages.down.kernel_fp8 import down_fp8_kernel
from epfuse.stages.extent import extents
from epfuse.stages.grid import pieces
from epfuse.stages.portable_launch import constants
from epfuse.stages.quantize.rows import FP8Rows, require_alike
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import GemmTile
from epfuse.target import target_of
from epfuse.weights.block_fp8 import BlockFP8, scale_block


@checks_enums
def launch_down_fp8(
    y: FP8Rows,
    w2: MXFP8 | BlockFP8,
    routes: RouteTable,
    topk_weights: torch.Tensor,
    tile: GemmTile,
    combine: Combine,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the down weights, a native FP8 dot per group of values, then the router weight in FP32.

    Args:
        y: ``[R, I]`` in the groups of w2: 32 beside MXFP8, 128 beside block FP8; only rows of local routes are read.
        w2: ``[L, H, I]``; MXFP8 with scales in ROWS layout, or block FP8.
        routes: RouteTable of this call.
        topk_weights: ``[T, K]`` float32 contiguous.
        tile: tile of the GEMM; its row block is ``routes.block_m``, its block_k a multiple of the group.
        combine: DETERMINISTIC writes a row per route, rounded once; ATOMIC adds to a row per token.
        out: DETERMINISTIC: ``[R, H]``, only rows of local routes are written. ATOMIC: ``[T, H]`` float32, zeros.
        bias: ``[L, H]`` float32, added before the router weight multiplies; None for none.

    Returns:
        ``out``.

    Raises:
        DtypeError, ShapeError: y is in another E4M3, or in other groups, than w2.

    Host syncs: none; graph-capturable.
    """
    require_alike("y", y, w2)
    intermediate, hidden = y.values.shape[1], w2.shape[1]
    grid = (routes.max_blocks * pieces(hidden, tile.block_n),)
    values, scales, router, results = extents(target_of(out.device), y.values, y.scales, topk_weights, out)
    down_fp8_kernel[grid](
        values,
        scales,
        w2.values,
        w2.scales,
        bias,
        router,
        results,
        *routes.blocks,
        hidden,
        intermediate,
        y.scales.shape[1],
        K=topk_weights.shape[1],
        GROUP=y.group,
        SCALE_ROWS=scale_block(w2)[0],
        ATOMIC=combine is Combine.ATOMIC,
        **constants(routes, tile, intermediate),
    )
    return out
