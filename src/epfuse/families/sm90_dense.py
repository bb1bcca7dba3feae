"""Gluon kernels for Hopper, dense weights and many rows an expert: rows are gathered, and both GEMMs are one launch.

One program a multiprocessor, with a producer and two or three consumers, and both operands in shared memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import ClassVar

from epfuse.config import Bias, Path, WeightFormat
from epfuse.families import blocks
from epfuse.families.family import CallKind, LayerCall, Reads, Steps
from epfuse.families.one_launch import OneLaunch
from epfuse.families.portable import PORTABLE
from epfuse.families.sm90 import SHARED_BYTES, SM90, UNALIGNED, dense_is_aligned
from epfuse.stages.tiles import ANY, GemmTile, LayerTiles, Sm90DenseTile, TileRange
from epfuse.target import Target

TWO_PARTS = (96, 144, 160, 192, 272, 288, 320)
"""Row blocks of two powers of two."""
MOST_SUMS = {2: 204, 3: 96}
"""Sums that a thread has registers for, by the number of consumers: with more the assembler makes products wait."""
BESIDE_RING = 8192
"""Bytes of shared memory that are kept for barriers, and for results on their way to memory."""


class Sm90Dense(OneLaunch):
    """route -> gather -> gate_up_down -> combine."""

    name: ClassVar[str] = "sm90_dense"
    tile: ClassVar[type[GemmTile]] = Sm90DenseTile
    biases: ClassVar[frozenset[Bias]] = frozenset(Bias)
    least_block_m: ClassVar[int] = 32
    reads: ClassVar[Reads] = {Target.SM90: {Path.BF16: (WeightFormat.DENSE,)}}

    def accepts(self, kind: CallKind) -> str | None:
        """BF16, and the sizes that the kernels of few rows take."""
        return super().accepts(kind) or SM90.accepts(kind)

    def defaults(self, kind: CallKind) -> tuple[TileRange, ...]:
        """Measured on an H200."""
        return DENSE_TILES

    def block_ms(self, rows: float) -> list[int]:
        """Two powers of two, or one."""
        powers = [size for size in blocks.powers_of_two(rows, 8) if size >= self.least_block_m]
        return sorted({*powers, *blocks.two_parts(rows, TWO_PARTS)})

    def candidates(self, kind: CallKind, block_m: int, rows: float) -> Iterator[GemmTile]:
        """The longest rings that fit."""
        if block_m < self.least_block_m:
            return
        for block_n, group_m, head in itertools.product(
            (128, 192, 256), (0, 1, 2, 4, 8), blocks.HEADS.get(block_m, (0,))
        ):
            rings = [Sm90DenseTile(block_n, 64, group_m, 4, stages, head=head) for stages in (3, 4, 5, 6, 8)]
            yield from [tile for tile in rings if self.fits(tile, kind.form, block_m)][-1:]

    def fits(self, tile: GemmTile, form: WeightFormat, block_m: int) -> bool:
        """Whether the block can be cut so, and the ring and the sums have room."""
        assert isinstance(tile, Sm90DenseTile)
        ring = tile.num_stages * tile.block_k * 2 * (tile.block_n + block_m)
        consumers = tile.consumers_of(block_m)
        held = tile.block_n * block_m <= 128 * consumers * MOST_SUMS[consumers] and block_m <= max(TWO_PARTS)
        return block_m >= self.least_block_m and tile.cuts(block_m) and ring + BESIDE_RING <= SHARED_BYTES and held

    def steps(self, call: LayerCall, tiles: LayerTiles) -> Steps:
        """The copy engine takes weights from multiples of 16 bytes; others go to the kernels for every GPU."""
        return super().steps(call, tiles) if dense_is_aligned(call) else PORTABLE.steps(call, UNALIGNED)

    def gemms(self) -> Callable[..., object]:
        """For Hopper."""
        from epfuse.stages.gate_up_down.launch_dense import launch_gate_up_down_dense

        return launch_gate_up_down_dense


# Measured on an H200 at 64, 128, 256 and 512 rows (docs/performance.md). Tiles of 288 rows multiply all of an expert's
# at once, 256 to a product; where they would lack many, or an expert would need a second block for some, others stand.
# From 720 rows on an expert takes several blocks of any size: measured at 1024 rows on two layers, where 192 rows were
# best, and at 2048 (256) and 4096 (192) on one; 288 took 3 to 7 % longer. At 512 and 2048 rows 192 were worse than 288.
DENSE_TILES = (
    TileRange(80, LayerTiles.both(96, Sm90DenseTile(128, 64, 1, 4, 7))),
    TileRange(132, LayerTiles.both(144, Sm90DenseTile(128, 64, 1, 4, 6))),
    TileRange(176, LayerTiles.both(192, Sm90DenseTile(256, 64, 1, 4, 3))),
    TileRange(320, LayerTiles.both(288, Sm90DenseTile(128, 64, 1, 4, 4))),
    TileRange(440, LayerTiles.both(192, Sm90DenseTile(256, 64, 8, 4, 3))),
    TileRange(720, LayerTiles.both(288, Sm90DenseTile(128, 64, 2, 4, 4))),
    TileRange(1450, LayerTiles.both(192, Sm90DenseTile(256, 64, 8, 4, 3))),
    TileRange(2900, LayerTiles.both(256, Sm90DenseTile(128, 64, 8, 4, 4))),
    TileRange(ANY, LayerTiles.both(192, Sm90DenseTile(256, 64, 8, 4, 3))),
)

SM90_DENSE = Sm90Dense()
