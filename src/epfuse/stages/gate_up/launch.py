"""Launch a gate_up kernel."""

from __future__ import annotations

import torch
import triton

from epfuse.config import SwiGLUOAI
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.stages.gate_up.kernel import gate_up_kernel
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import GemmTile, Sm90Tile
from epfuse.target import compute_units
from epfuse.weights.experts import stack_rows
from epfuse.weights.fragment import FragmentMXFP8


def launch_gate_up(
    x: torch.Tensor,
    w13: torch.Tensor | MXFP8 | FragmentMXFP8,
    routes: RouteTable,
    top_k: int,
    activation: SwiGLUOAI,
    tile: GemmTile,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gather routed rows, apply gate and up weights, then SwiGLU-OAI.

    Args:
        x: ``[T, H]``, contiguous; bf16, fp16 or fp32; bf16 with MXFP8 weights.
        w13: ``[L, 2I, H]``: dense in x's dtype, MXFP8 (dequantised in registers; scales in ROWS layout), or MXFP8 in
            fragment order with rows in order GATE_UP (Hopper).
        routes: RouteTable of this call; row r reads token ``r // K``.
        top_k: K.
        activation: its parameters.
        tile: tile of the GEMM; its row block is ``routes.block_m``.
        out: ``[R, I]``, dtype of x; only rows of local routes are written, row r for route r. Allocated if None.

    Returns:
        ``out``.

    Host syncs: none; graph-capturable.
    """
    hidden = x.shape[1]
    intermediate = stack_rows(w13) // 2
    if out is None:
        out = torch.empty(routes.num_routes, intermediate, dtype=x.dtype, device=x.device)
    if isinstance(tile, Sm90Tile):
        assert not isinstance(w13, MXFP8)
        launch_sm90(x, w13, out, routes, top_k, activation, tile)
        return out
    assert not isinstance(w13, FragmentMXFP8)
    weights, scales = (w13.values, w13.scales) if isinstance(w13, MXFP8) else (w13, None)
    grid = (routes.max_blocks * triton.cdiv(intermediate, tile.block_n // 2),)
    gate_up_kernel[grid](
        x,
        weights,
        scales,
        out,
        routes.sorted_routes,
        routes.block_expert,
        routes.num_padded,
        routes.num_routes,
        hidden,
        intermediate,
        activation.alpha,
        activation.beta,
        activation.limit,
        K=top_k,
        BLOCK_M=routes.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        EVEN_K=hidden % tile.block_k == 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def launch_sm90(
    x: torch.Tensor,
    w13: torch.Tensor | FragmentMXFP8,
    out: torch.Tensor,
    routes: RouteTable,
    top_k: int,
    activation: SwiGLUOAI,
    tile: Sm90Tile,
) -> None:
    """`launch_gate_up` with a Hopper kernel: dense weights as they are, MXFP8 ones in fragment order."""
    from epfuse.stages.gate_up.kernel_sm90 import gate_up_sm90_kernel
    from epfuse.stages.sm90_launch import constants, operand_of, row_tiles, shared_sums

    hidden, intermediate = x.shape[1], out.shape[1]
    w = operand_of(w13, 2 * intermediate)
    tiles, programs = row_tiles(w, routes, tile), compute_units(x.device)
    scalars = (activation.alpha, activation.beta, activation.limit)
    options = constants(routes, tile)
    table = (routes.sorted_routes, routes.block_expert, routes.num_padded)
    sizes = (routes.num_routes, hidden, intermediate, w.columns, w.panels, w.weights.shape[0], 2 * programs)
    options |= {
        "K": top_k,
        "BLOCK_N": tile.block_n,
        "EVEN_K": hidden == w.columns,
        "GUESS": min(tile.guess_bytes, w.columns * w.weights.element_size()) // 16 * 16,
    }
    shares = shared_sums(tile, tiles, routes, slice(None, tiles))
    gate_up_sm90_kernel[(tiles * tile.split_k,)](
        x, w.weights, w.scales, out, *table, *shares, *sizes, *scalars, SPLIT_K=tile.split_k, **options
    )
