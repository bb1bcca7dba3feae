"""Launch gate_up on Hopper, for few rows an expert."""

from __future__ import annotations

import torch

from epfuse.config import Activation
from epfuse.stages.gate_up.kernel_sm90 import gate_up_sm90_kernel
from epfuse.stages.route.table import RouteTable
from epfuse.stages.sm90_launch import constants, operand_of, places_of, programs_of, row_tiles, shared_sums
from epfuse.stages.tiles import Sm90Tile
from epfuse.target import compute_units
from epfuse.weights.block_fp8 import BlockFP8
from epfuse.weights.fragment import FragmentMXFP8
from epfuse.weights.row_fp8 import RowFP8


def launch_gate_up_sm90(
    x: torch.Tensor,
    w13: torch.Tensor | FragmentMXFP8 | RowFP8 | BlockFP8,
    routes: RouteTable,
    top_k: int,
    activation: Activation,
    tile: Sm90Tile,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`launch_gate_up` with the Hopper kernel.

    Args:
        x: ``[T, H]`` BF16, contiguous.
        w13: ``[L, 2I, H]``: dense BF16, block FP8 with I a multiple of 128, or, with rows in order GATE_UP, MXFP8 in
            fragment order or FP8 with one scale a row.
        routes: RouteTable of this call; row r reads token ``r // K``; with arrivals if the tile shares reductions.
        top_k: K.
        activation: between the two GEMMs.
        tile: tile of the GEMM; its row block is ``routes.block_m``.
        out: ``[R, I]`` BF16; only rows of local routes are written, row r for route r.
        bias: ``[L, 2I]`` float32, gate before up, added before the activation; None for none.

    Returns:
        ``out``.

    Host syncs: none; graph-capturable.
    """
    hidden, intermediate = x.shape[1], w13.shape[1] // 2
    w = operand_of(w13, 2 * intermediate, tile.block_k)
    tiles, units = row_tiles(w, routes, tile), compute_units(x.device)
    places = places_of(tile, routes.block_m, x.device)
    options = constants(routes, tile)
    table = (routes.sorted_routes, routes.block_expert, routes.num_padded)
    sizes = (routes.num_routes, hidden, intermediate, w.columns, w.panels, w.weights.shape[0], 2 * units)
    row = w.columns if isinstance(w13, (FragmentMXFP8, RowFP8)) else hidden
    options |= {
        "K": top_k,
        "BLOCK_N": tile.block_n,
        "EVEN_K": hidden == w.columns,
        "ACTIVATION": activation.kind,
        "GUESS": min(tile.guess_bytes, row * w.weights.element_size()) // 16 * 16,
    }
    shares = shared_sums(tile, tiles, places, routes, slice(None, tiles))
    gate_up_sm90_kernel[(programs_of(tile, tiles, places),)](
        x,
        w.weights,
        w.scales,
        bias,
        out,
        *table,
        *shares,
        *sizes,
        activation.parameters,
        places,
        SPLIT_K=tile.split_k,
        TAIL_SPLIT=tile.tail_split,
        **options,
    )
    return out
