"""Launch the two-tile kernel, with the tile of InferenceX pull request 1782, on the meta device."""

from __future__ import annotations

import torch
import triton

from epfuse.aot.seed.kernel import two_tiles_kernel
from epfuse.config import LayerShape, SwiGLUOAI
from epfuse.stages.route.table import max_padded
from epfuse.stages.tiles import GemmTile

BLOCK_M = 16
TILE = GemmTile(block_n=64, block_k=128, group_m=0, num_warps=4, num_stages=2)
"""The pull request gives 16-row tiles and its patch 64 x 128 weight tiles, 4 warps and 2 stages."""


def launch_two_tiles(shape: LayerShape, tokens: int) -> None:
    """Launch GEMM1 of a BF16 layer; for `epfuse.aot.launches.launches_of`, which launches nothing.

    Args:
        shape: the layer's sizes; all operands are made here, on the meta device.
        tokens: T.
    """
    routes = tokens * shape.top_k
    padded = max_padded(routes, shape.local_experts, BLOCK_M)

    def empty(*sizes: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    activation = SwiGLUOAI()
    grid = (padded // BLOCK_M * triton.cdiv(shape.intermediate, TILE.block_n),)
    two_tiles_kernel[grid](
        empty(tokens, shape.hidden, dtype=torch.bfloat16),
        empty(shape.local_experts, 2 * shape.intermediate, shape.hidden, dtype=torch.bfloat16),
        empty(routes, shape.intermediate, dtype=torch.bfloat16),
        empty(padded),
        empty(padded // BLOCK_M),
        empty(1),
        routes,
        shape.hidden,
        shape.intermediate,
        activation.parameters,
        K=shape.top_k,
        ACTIVATION=activation.kind,
        BLOCK_M=BLOCK_M,
        BLOCK_N=TILE.block_n,
        BLOCK_K=TILE.block_k,
        GROUP_M=TILE.group_m,
        num_warps=TILE.num_warps,
        num_stages=TILE.num_stages,
    )
