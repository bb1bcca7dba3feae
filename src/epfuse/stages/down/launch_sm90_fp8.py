"""Launch the down kernel of Hopper's FP8 rows."""

from __future__ import annotations

import torch

from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.route.table import LoneTokens, RouteTable, where_stored
from epfuse.stages.tiles import Sm90PersistentTile
from epfuse.target import compute_units
from epfuse.weights.row_fp8 import RowFP8


def launch_down_sm90_fp8(
    y: FP8Rows,
    w2: RowFP8,
    routes: RouteTable,
    topk_weights: torch.Tensor,
    tile: Sm90PersistentTile,
    out: torch.Tensor,
    lone: LoneTokens | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the down weights to packed FP8 rows by native FP8 products, then the router weight in FP32; round once.

    Args:
        y: ``[R, I]`` from `launch_quantize_packed`.
        w2: ``[L, H, I]`` with rows in order PLAIN.
        routes: RouteTable of this call, with arrivals, zeros: the second one is used. Like w2 not written by the launch
            right before this one, which may still be running when they are read.
        topk_weights: ``[T, K]`` float32 contiguous.
        tile: of the GEMM; block_k is 128, parts 1.
        out: ``[R, H]`` BF16, packed; only as many rows as there are local routes are written, the first ones.
        lone: from `launch_quantize_packed`: the rows of its tokens go to its ``out`` instead.
        bias: ``[L, H]`` float32, added before the router weight multiplies; None for none.

    Returns:
        ``out``.

    Raises:
        ConfigError: the tile has another block_k or more parts.

    Host syncs: none; graph-capturable.
    """
    from epfuse.stages.down.kernel_sm90_fp8 import down_sm90_fp8_kernel
    from epfuse.stages.sm90_launch import check_fp8_tile, constants, row_parts, weight_lines

    check_fp8_tile(tile)
    head, rest = tile.rows_of(routes.block_m)
    down_sm90_fp8_kernel[(compute_units(out.device),)](
        *row_parts(y.values, head, rest, tile.block_k),
        y.scales,
        weight_lines(w2, tile.block_k),
        w2.scales,
        bias,
        topk_weights,
        out,
        *where_stored(lone),
        *routes.packed(1),
        w2.rows,
        w2.steps,
        w2.panels,
        HEAD=head,
        CONSUMERS=tile.consumers,
        **constants(routes, tile),
    )
    return out
