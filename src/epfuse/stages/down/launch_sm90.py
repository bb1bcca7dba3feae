"""Launch down on Hopper, for few rows an expert."""

from __future__ import annotations

import torch

from epfuse.stages.down.kernel_sm90 import down_sm90_kernel
from epfuse.stages.route.table import RouteTable
from epfuse.stages.sm90_launch import constants, operand_of, places_of, programs_of, row_tiles, shared_sums
from epfuse.stages.tiles import Sm90Tile
from epfuse.weights.block_fp8 import BlockFP8
from epfuse.weights.fragment import FragmentMXFP8
from epfuse.weights.row_fp8 import RowFP8


def launch_down_sm90(
    y: torch.Tensor,
    w2: torch.Tensor | FragmentMXFP8 | RowFP8 | BlockFP8,
    routes: RouteTable,
    topk_weights: torch.Tensor,
    tile: Sm90Tile,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`launch_down` with the Hopper kernel.

    Args:
        y: ``[R, I]`` BF16 contiguous, from `launch_gate_up_sm90`; only rows of local routes count.
        w2: ``[L, H, I]``: dense BF16, block FP8, or, in order PLAIN, MXFP8 in fragment order or FP8 with one scale a
            row.
        routes: RouteTable of this call; with arrivals if the tile shares reductions. Like w2 not written by the launch
            right before this one, which may still be running when they are read.
        topk_weights: ``[T, K]`` float32 contiguous.
        tile: tile of the GEMM; its row block is ``routes.block_m``.
        out: ``[R, H]`` BF16; only rows of local routes are written, row r for route r.
        bias: ``[L, H]`` float32, added before the router weight multiplies; None for none.

    Returns:
        ``out``.

    Host syncs: none; graph-capturable.
    """
    hidden, intermediate = w2.shape[1], y.shape[1]
    w = operand_of(w2, hidden, tile.block_k)
    tiles = row_tiles(w, routes, tile)
    options = constants(routes, tile)
    table = (routes.sorted_routes, routes.block_expert, routes.num_padded)
    places = places_of(tile, routes.block_m, y.device)
    sizes = (routes.num_routes, hidden, intermediate, w.columns, w.panels, places)
    options |= {"BLOCK_N": tile.block_n, "EVEN_K": intermediate == w.columns, "TAIL_SPLIT": tile.tail_split}
    shares = shared_sums(tile, tiles, places, routes, slice(-tiles, None))
    down_sm90_kernel[(programs_of(tile, tiles, places),)](
        y, w.weights, w.scales, bias, topk_weights, out, *table, *shares, *sizes, SPLIT_K=tile.split_k, **options
    )
    return out
