"""Gluon kernels for Hopper and many rows an expert: rows are gathered first, and both GEMMs are one launch.

One program a multiprocessor, with a producer and two or three consumers, on MXFP8 weights in fragment order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import ClassVar

from epfuse.config import Bias, Path, WeightFormat
from epfuse.families import blocks
from epfuse.families.family import CallKind, Reads
from epfuse.families.one_launch import OneLaunch
from epfuse.families.sm90 import SHARED_BYTES
from epfuse.stages.tiles import ANY, GemmTile, LayerTiles, Sm90PersistentTile, TileRange, has_few_tiles
from epfuse.target import Target

TWO_PARTS = (96, 144, 160, 192, 256, 272, 288, 320)
"""Row blocks of two powers of two, and of two equal ones. Not 48 and 80: for 32 and 64 rows an expert, 96 and 128 are
a hundredth slower than those if the router is even, and up to 40 % faster if it is not (docs/performance.md)."""


class Sm90Packed(OneLaunch):
    """route -> gather -> gate_up_down -> combine."""

    name: ClassVar[str] = "sm90_packed"
    tile: ClassVar[type[GemmTile]] = Sm90PersistentTile
    biases: ClassVar[frozenset[Bias]] = frozenset(Bias)
    least_block_m: ClassVar[int] = 32
    reads: ClassVar[Reads] = {Target.SM90: {Path.W8A16: (WeightFormat.FRAGMENT,)}}

    def defaults(self, kind: CallKind) -> tuple[TileRange, ...]:
        """Measured on an H100, and on an H200 from 140 rows an expert on."""
        return FEW_FRAGMENT_TILES if has_few_tiles(kind.shape) else FRAGMENT_TILES

    def block_ms(self, rows: float) -> list[int]:
        """Two powers of two, or one."""
        powers = [size for size in blocks.powers_of_two(rows, 8) if size >= self.least_block_m]
        return sorted({*powers, *blocks.two_parts(rows, TWO_PARTS)})

    def candidates(self, kind: CallKind, block_m: int, rows: float) -> Iterator[GemmTile]:
        """Three consumers and whole steps, or two and half steps, which leave room for many rows.

        Two and whole steps where a layer has few tiles: so it has more of them.
        """
        if block_m < self.least_block_m:
            return
        narrow = ((128, 128),) if has_few_tiles(kind.shape) else ()
        widths = ((128, 64),) if block_m >= 256 else ((192, 128), *narrow)
        for (block_n, block_k), group_m, stages, parts, head in itertools.product(
            widths, (0, 1, 2, 4, 8), (3, 4, 5), (1, 2), blocks.HEADS.get(block_m, (0,))
        ):
            if block_k == 128 or parts > 1:
                tile = Sm90PersistentTile(block_n, block_k, group_m, 4, stages, parts=parts, head=head)
                if _ring_fits(tile, block_m):
                    yield tile

    def fits(self, tile: GemmTile, form: WeightFormat, block_m: int) -> bool:
        """Whether the block can be cut so, and the ring and the accumulators have room."""
        assert isinstance(tile, Sm90PersistentTile)
        return block_m >= self.least_block_m and tile.cuts(block_m) and _ring_fits(tile, block_m)

    def gemms(self) -> Callable[..., object]:
        """For Hopper."""
        from epfuse.stages.gate_up_down.launch import launch_gate_up_down

        return launch_gate_up_down


def _ring_fits(tile: Sm90PersistentTile, block_m: int) -> bool:
    """Whether the ring fits shared memory, and the accumulators the registers."""
    ring = tile.num_stages * tile.block_k * (tile.block_n + block_m * 2)
    return ring <= SHARED_BYTES and not (tile.consumers > 2 and block_m >= 256)


# Measured on an H100 up to 140 rows: a block holds twice the rows that an expert can expect, and costs little where it
# has no more. From there on on an H200, at 25 counts of five layers (docs/performance.md, "Many rows an expert").
FRAGMENT_TILES = (
    TileRange(72, LayerTiles.both(128, Sm90PersistentTile(192, 128, 2, 4, 3, 1, head=64))),
    TileRange(140, LayerTiles.both(144, Sm90PersistentTile(192, 128, 2, 4, 3, 1))),
    TileRange(180, LayerTiles.both(192, Sm90PersistentTile(192, 128, 2, 4, 3, 1))),
    TileRange(205, LayerTiles.both(128, Sm90PersistentTile(192, 128, 1, 4, 3))),
    TileRange(304, LayerTiles.both(320, Sm90PersistentTile(128, 64, 1, 4, 4))),
    TileRange(390, LayerTiles.both(192, Sm90PersistentTile(192, 128, 1, 4, 3, 1))),
    TileRange(420, LayerTiles.both(144, Sm90PersistentTile(192, 128, 1, 4, 3, 1))),
    TileRange(465, LayerTiles.both(160, Sm90PersistentTile(192, 128, 1, 4, 3, 1))),
    TileRange(ANY, LayerTiles.both(192, Sm90PersistentTile(192, 128, 1, 4, 3))),
)
# The same of layers with few tiles, above those of few rows in `FEW_TILES`.
FEW_FRAGMENT_TILES = (
    TileRange(190, LayerTiles.both(96, Sm90PersistentTile(128, 128, 1, 4, 3, 1))),
    TileRange(270, LayerTiles.both(128, Sm90PersistentTile(128, 128, 1, 4, 3, 1))),
    TileRange(390, LayerTiles.both(192, Sm90PersistentTile(128, 128, 1, 4, 3, 1))),
    TileRange(700, LayerTiles.both(256, Sm90PersistentTile(128, 64, 2, 4, 5))),
    TileRange(ANY, FRAGMENT_TILES[-1].tiles),
)

SM90_PACKED = Sm90Packed()
