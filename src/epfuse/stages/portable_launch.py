"""What the launches of the portable GEMMs share."""

from __future__ import annotations

import torch

from epfuse.numerics.mxfp8 import MXFP8
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import GemmTile


def operands_of(stack: torch.Tensor | MXFP8) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights as the kernels take them: numbers or codes, and the codes' scales."""
    return (stack.values, stack.scales) if isinstance(stack, MXFP8) else (stack, None)


def constants(routes: RouteTable, tile: GemmTile, columns: int) -> dict[str, int]:
    """Compile-time arguments and launch options that all of them have; ``columns`` of the reduction."""
    return {
        "BLOCK_M": routes.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "EVEN_K": columns % tile.block_k == 0,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
