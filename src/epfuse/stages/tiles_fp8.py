"""Tiles of the grouped GEMMs with FP8 rows; block_k is a multiple of both groups, 32 and 128."""

from __future__ import annotations

from epfuse.arguments import checks_enums
from epfuse.config import WeightFormat
from epfuse.stages.tiles import ANY, GemmTile, LayerTiles, Sm90PersistentTile, TileRange
from epfuse.target import Target


@checks_enums
def fp8_ranges(target: Target, weights: WeightFormat) -> tuple[TileRange, ...]:
    """A target's default tiles of the FP8 paths, by expected rows per expert, ascending; the last range has no end.

    Args:
        target: a GPU.
        weights: the format that the kernels read.
    """
    return SM90_ROW_FP8 if weights is WeightFormat.ROW_FP8 else FP8[target]


def _layer(block_m: int, tile: GemmTile) -> LayerTiles:
    return LayerTiles(block_m, tile, tile)


# From the compiler's resources (registers, shared memory), not measured. A group's sum and the accumulators both live
# in registers: a tile has at most 64 of each a lane.
_AMD = (
    # two waves: with four, a lane would load 8 bytes of the weights' 32-column groups at a time, not 16
    TileRange(12, _layer(16, GemmTile(64, 128, 0, 2, 2))),
    TileRange(48, _layer(32, GemmTile(128, 128, 0, 4, 2))),
    TileRange(ANY, _layer(64, GemmTile(128, 128, 8, 4, 2))),
)
FP8: dict[Target, tuple[TileRange, ...]] = {
    Target.SM90: (
        TileRange(12, _layer(16, GemmTile(128, 128, 0, 4, 4))),
        TileRange(20, _layer(32, GemmTile(128, 128, 0, 4, 4))),
        TileRange(48, _layer(64, GemmTile(128, 128, 0, 4, 3))),
        TileRange(ANY, _layer(128, GemmTile(128, 128, 8, 8, 3))),
    ),
    Target.GFX942: _AMD,
    Target.GFX950: _AMD,
}

# Weights with one scale a row; measured on an H100 (docs/performance.md). From 44 rows on two consumers: each GEMM has
# its own launch, and smaller tiles leave less of the GPU idle at the end of both.
SM90_ROW_FP8 = (
    TileRange(12, _layer(16, Sm90PersistentTile(192, 128, 0, 4, 5, 1))),
    TileRange(24, _layer(32, Sm90PersistentTile(192, 128, 0, 4, 5, 1))),
    TileRange(44, _layer(96, Sm90PersistentTile(192, 128, 2, 4, 5, 1, head=32))),
    TileRange(72, _layer(96, Sm90PersistentTile(128, 128, 2, 4, 6, 1))),
    TileRange(ANY, _layer(160, Sm90PersistentTile(128, 128, 2, 4, 5, 1))),
)
