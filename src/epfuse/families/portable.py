"""Triton kernels for every GPU: activations as they are, weights dense or MXFP8 as checkpoints have them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch

from epfuse.config import ACTIVATIONS, Activation, Bias, Path, WeightFormat
from epfuse.families import blocks
from epfuse.families.family import CallKind, Reads
from epfuse.families.two_gemms import TwoGemms
from epfuse.stages.tiles import ANY, GemmTile, LayerTiles, TileRange
from epfuse.target import Target


class Portable(TwoGemms):
    """route -> gate_up -> down -> combine."""

    name: ClassVar[str] = "portable"
    tile: ClassVar[type[GemmTile]] = GemmTile
    every_gpu: ClassVar[bool] = True
    activations: ClassVar[frozenset[type[Activation]]] = frozenset(ACTIVATIONS)
    biases: ClassVar[frozenset[Bias]] = frozenset(Bias)
    reads: ClassVar[Reads] = {
        Target.SM90: {Path.W8A16: (WeightFormat.MXFP8,), Path.BF16: (WeightFormat.DENSE,)},
        Target.GFX942: {
            Path.W8A16: (WeightFormat.MXFP8_FNUZ, WeightFormat.MXFP8),
            Path.BF16: (WeightFormat.DENSE,),
        },
        Target.GFX950: {Path.W8A16: (WeightFormat.MXFP8,), Path.BF16: (WeightFormat.DENSE,)},
    }

    def defaults(self, kind: CallKind) -> tuple[TileRange, ...]:
        """Dense or MXFP8 tables; FP32 has one tile."""
        if kind.form is not WeightFormat.DENSE:
            return MXFP8_TILES[kind.target]
        return FLOAT32_TILES if kind.dtype == torch.float32 else DENSE_TILES[kind.target]

    def candidates(self, kind: CallKind, block_m: int, rows: float) -> Iterator[GemmTile]:
        """Tiles whose accumulators fill the warps and whose weights fit shared memory."""
        wide = (64, 128, 256) if kind.form is WeightFormat.DENSE else (64, 128)
        for block_n, block_k, group_m, warps, stages in itertools.product(
            (32, 64, 128, 256), wide, blocks.groups(block_m), (4, 8), (2,) if kind.target.is_amd else (3, 4)
        ):
            filled = block_m * block_n >= 512 * warps // 4
            if block_k <= max(64, kind.shape.hidden) and filled and block_n * block_k <= 1 << 15:
                yield GemmTile(block_n, block_k, group_m, warps, stages)

    def gemms(self) -> tuple[Callable[..., object], Callable[..., object]]:
        """For every GPU."""
        from epfuse.stages.down.launch import launch_down
        from epfuse.stages.gate_up.launch import launch_gate_up

        return launch_gate_up, launch_down


# 16-bit weights.
_DENSE_AMD = (
    # 64 KiB of LDS per compute unit; from the compiler's resources, not measured
    TileRange(12, LayerTiles(16, GemmTile(64, 128, 0, 4, 2), GemmTile(64, 128, 0, 4, 2))),
    TileRange(48, LayerTiles(64, GemmTile(128, 64, 0, 4, 2), GemmTile(128, 64, 0, 4, 2))),
    TileRange(ANY, LayerTiles(128, GemmTile(256, 64, 8, 8, 2), GemmTile(256, 64, 8, 8, 2))),
)
DENSE_TILES: dict[Target, tuple[TileRange, ...]] = {
    Target.SM90: (
        TileRange(12, LayerTiles(16, GemmTile(64, 256, 0, 4, 3), GemmTile(64, 256, 0, 4, 3))),
        TileRange(20, LayerTiles(32, GemmTile(128, 128, 0, 4, 3), GemmTile(128, 128, 0, 4, 3))),
        TileRange(48, LayerTiles(64, GemmTile(256, 64, 0, 8, 3), GemmTile(256, 64, 0, 8, 3))),
        TileRange(ANY, LayerTiles(128, GemmTile(256, 64, 8, 8, 3), GemmTile(256, 64, 8, 8, 3))),
    ),
    Target.GFX942: _DENSE_AMD,
    Target.GFX950: _DENSE_AMD,
}
# MXFP8 weights in checkpoint order, dequantised in registers.
_MXFP8_AMD = (
    TileRange(12, LayerTiles(16, GemmTile(64, 128, 0, 4, 2), GemmTile(64, 128, 0, 4, 2))),
    TileRange(48, LayerTiles(64, GemmTile(128, 64, 0, 4, 2), GemmTile(128, 64, 0, 4, 2))),
    TileRange(ANY, LayerTiles(128, GemmTile(128, 64, 8, 8, 2), GemmTile(128, 64, 8, 8, 2))),
)
MXFP8_TILES: dict[Target, tuple[TileRange, ...]] = {
    Target.SM90: (
        TileRange(12, LayerTiles(16, GemmTile(64, 128, 0, 4, 4), GemmTile(64, 128, 0, 4, 4))),
        TileRange(48, LayerTiles(64, GemmTile(128, 64, 0, 4, 4), GemmTile(128, 64, 0, 4, 4))),
        TileRange(ANY, LayerTiles(128, GemmTile(128, 64, 8, 8, 3), GemmTile(128, 64, 8, 8, 3))),
    ),
    Target.GFX942: _MXFP8_AMD,
    Target.GFX950: _MXFP8_AMD,
}
# FP32 has no tensor cores here: correctness, not speed.
FLOAT32_TILES = (TileRange(ANY, LayerTiles(16, GemmTile(64, 32, 0, 4, 2), GemmTile(64, 32, 0, 4, 2))),)

PORTABLE = Portable()
