"""Launch the down kernel of Hopper's FP8 rows and block FP8 weights."""

from __future__ import annotations

import torch

from epfuse.stages.grid import pieces
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.route.table import LoneTokens, RouteTable, where_stored
from epfuse.stages.tiles import Sm90BlockTile
from epfuse.target import compute_units
from epfuse.weights.block_fp8 import BLOCK, BlockFP8


def launch_down_sm90_block_fp8(
    y: FP8Rows,
    w2: BlockFP8,
    routes: RouteTable,
    topk_weights: torch.Tensor,
    tile: Sm90BlockTile,
    out: torch.Tensor,
    lone: LoneTokens | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the down weights to packed FP8 rows by native FP8 products, then the router weight in FP32; round once.

    Args:
        y: ``[R, I]`` in groups of 128, from `launch_gate_up_sm90_block_fp8`.
        w2: ``[L, H, I]``, H and I multiples of 16.
        routes: RouteTable of this call, with arrivals, zeros: the second one is used. Like w2 not written by the launch
            right before this one, which may still be running when they are read.
        topk_weights: ``[T, K]`` float32 contiguous.
        tile: of the GEMM.
        out: ``[R, H]`` BF16, packed; only as many rows as there are local routes are written, the first ones.
        lone: from `launch_quantize_packed`: the rows of its tokens go to its ``out`` instead.
        bias: ``[L, H]`` float32, added before the router weight multiplies; None for none.

    Returns:
        ``out``.

    Host syncs: none; graph-capturable; bitwise repeatable.
    """
    from epfuse.stages.down.kernel_sm90_block_fp8 import down_sm90_block_fp8_kernel
    from epfuse.stages.sm90_launch import block_constants, block_rows, weight_blocks

    _, hidden, intermediate = w2.values.shape
    down_sm90_block_fp8_kernel[(compute_units(out.device),)](
        block_rows(y, routes.block_m),
        y.scales,
        weight_blocks(w2),
        w2.scales,
        bias,
        topk_weights,
        out,
        *where_stored(lone),
        *routes.packed(1),
        hidden,
        pieces(intermediate, BLOCK),
        **block_constants(routes, tile),
    )
    return out
