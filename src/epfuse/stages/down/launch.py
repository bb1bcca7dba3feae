"""Launch a down kernel."""

from __future__ import annotations

import torch
import triton

from epfuse.numerics.mxfp8 import MXFP8
from epfuse.stages.down.kernel import down_kernel
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import GemmTile, Sm90Tile
from epfuse.weights.experts import stack_rows
from epfuse.weights.fragment import FragmentMXFP8


def launch_down(
    y: torch.Tensor,
    w2: torch.Tensor | MXFP8 | FragmentMXFP8,
    routes: RouteTable,
    topk_weights: torch.Tensor | None,
    tile: GemmTile,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the down weights, then the router weight in FP32, then round once.

    Args:
        y: ``[R, I]`` contiguous, from `launch_gate_up`; only rows of local routes count; bf16 with MXFP8 weights.
        w2: ``[L, H, I]``: dense in y's dtype, MXFP8 (dequantised in registers; scales in ROWS layout), or MXFP8 in
            fragment order with rows in order PLAIN (Hopper).
        routes: RouteTable of this call. Like w2 not written by the launch right before this one, which on Hopper may
            still be running when they are read.
        topk_weights: ``[T, K]`` float32 contiguous; None leaves the weighting to combine.
        tile: tile of the GEMM; its row block is ``routes.block_m``.
        out: ``[R, H]``, dtype of y; only rows of local routes are written, row r for route r. Allocated if None.

    Returns:
        ``out``.

    Host syncs: none; graph-capturable.
    """
    intermediate = y.shape[1]
    hidden = stack_rows(w2)
    if out is None:
        out = torch.empty(routes.num_routes, hidden, dtype=y.dtype, device=y.device)
    if isinstance(tile, Sm90Tile):
        assert not isinstance(w2, MXFP8)
        launch_sm90(y, w2, out, routes, topk_weights, tile)
        return out
    assert not isinstance(w2, FragmentMXFP8)
    weights, scales = (w2.values, w2.scales) if isinstance(w2, MXFP8) else (w2, None)
    grid = (routes.max_blocks * triton.cdiv(hidden, tile.block_n),)
    down_kernel[grid](
        y,
        weights,
        scales,
        topk_weights,
        out,
        routes.sorted_routes,
        routes.block_expert,
        routes.num_padded,
        routes.num_routes,
        hidden,
        intermediate,
        BLOCK_M=routes.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        EVEN_K=intermediate % tile.block_k == 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def launch_sm90(
    y: torch.Tensor,
    w2: torch.Tensor | FragmentMXFP8,
    out: torch.Tensor,
    routes: RouteTable,
    topk_weights: torch.Tensor | None,
    tile: Sm90Tile,
) -> None:
    """`launch_down` with a Hopper kernel: dense weights as they are, MXFP8 ones in fragment order."""
    from epfuse.stages.down.kernel_sm90 import down_sm90_kernel
    from epfuse.stages.sm90_launch import constants, operand_of, row_tiles, shared_sums

    hidden, intermediate = out.shape[1], y.shape[1]
    w = operand_of(w2, hidden)
    tiles = row_tiles(w, routes, tile)
    options = constants(routes, tile)
    table = (routes.sorted_routes, routes.block_expert, routes.num_padded)
    sizes = (routes.num_routes, hidden, intermediate, w.columns, w.panels)
    options |= {"BLOCK_N": tile.block_n, "EVEN_K": intermediate == w.columns}
    shares = shared_sums(tile, tiles, routes, slice(-tiles, None))
    down_sm90_kernel[(tiles * tile.split_k,)](
        y, w.weights, w.scales, topk_weights, out, *table, *shares, *sizes, SPLIT_K=tile.split_k, **options
    )
