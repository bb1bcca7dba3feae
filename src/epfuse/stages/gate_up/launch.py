"""Launch the portable gate_up kernel."""

from __future__ import annotations

import torch

from epfuse.config import Activation
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.stages.extent import extents
from epfuse.stages.gate_up.kernel import gate_up_kernel
from epfuse.stages.grid import pieces
from epfuse.stages.portable_launch import constants, operands_of
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import GemmTile
from epfuse.target import target_of


def launch_gate_up(
    x: torch.Tensor,
    w13: torch.Tensor | MXFP8,
    routes: RouteTable,
    top_k: int,
    activation: Activation,
    tile: GemmTile,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gather routed rows, apply gate and up weights, then the activation.

    Args:
        x: ``[T, H]``, contiguous; bf16, fp16 or fp32; bf16 with MXFP8 weights.
        w13: ``[L, 2I, H]``, or ``[L, I, H]`` where the activation has no gate: dense in x's dtype, or MXFP8
            (dequantised in registers; scales in ROWS layout).
        routes: RouteTable of this call; row r reads token ``r // K``.
        top_k: K.
        activation: between the two GEMMs.
        tile: tile of the GEMM; its row block is ``routes.block_m``.
        out: ``[R, I]``, dtype of x; only rows of local routes are written, row r for route r.
        bias: ``[L, 2I]`` or ``[L, I]`` float32, added before the activation; None for none.

    Returns:
        ``out``.

    Host syncs: none; graph-capturable.
    """
    hidden = x.shape[1]
    intermediate = w13.shape[1] // activation.inputs
    grid = (routes.max_blocks * pieces(intermediate, tile.block_n // activation.inputs),)
    rows, results = extents(target_of(out.device), x, out)
    gate_up_kernel[grid](
        rows,
        *operands_of(w13),
        bias,
        results,
        *routes.blocks,
        hidden,
        intermediate,
        activation.parameters,
        K=top_k,
        ACTIVATION=activation.kind,
        INPUTS=activation.inputs,
        **constants(routes, tile, hidden),
    )
    return out
