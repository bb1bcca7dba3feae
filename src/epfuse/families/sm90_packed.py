"""Gluon kernels for Hopper and many rows an expert: rows are gathered first, and both GEMMs are one launch.

One program a multiprocessor, with a producer and two or three consumers, on MXFP8 weights in fragment order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import ClassVar

from epfuse.config import Bias, Path, WeightFormat
from epfuse.families import blocks
from epfuse.families.family import CallKind, Family, LayerCall, Reads, Stage, Step, Steps
from epfuse.families.memory import rows_between
from epfuse.families.sm90 import SHARED_BYTES
from epfuse.stages.route.table import LoneTokens
from epfuse.stages.tiles import ANY, GemmTile, LayerTiles, Sm90PersistentTile, TileRange
from epfuse.target import Target

TWO_PARTS = (96, 144, 160, 272, 288, 320)
"""Row blocks of two powers of two. Not 48 and 80: for 32 and 64 rows an expert, 96 and 128 are a hundredth slower than
those if the router is even, and up to 40 % faster if it is not (docs/performance.md)."""
HEADS = {64: (0, 32), 96: (0, 32), 128: (0, 64)}
"""Heads of these row blocks: with a small one they cost little where experts have few rows."""
LARGEST_TWO_PARTS = 272
"""From here on the rows of an expert take several blocks, of this size or larger."""


class Sm90Packed(Family):
    """route -> gather -> gate_up_down -> combine."""

    name: ClassVar[str] = "sm90_packed"
    tile: ClassVar[type[GemmTile]] = Sm90PersistentTile
    biases: ClassVar[frozenset[Bias]] = frozenset(Bias)
    least_block_m: ClassVar[int] = 32
    reads: ClassVar[Reads] = {Target.SM90: {Path.W8A16: (WeightFormat.FRAGMENT,)}}

    def defaults(self, kind: CallKind) -> tuple[TileRange, ...]:
        """Measured on an H100."""
        return FRAGMENT_TILES

    def block_ms(self, rows: float) -> list[int]:
        """Two powers of two, or one."""
        powers = [size for size in blocks.powers_of_two(rows, 8) if size >= self.least_block_m]
        return sorted({*powers, *two_parts(rows, LARGEST_TWO_PARTS, max(TWO_PARTS))})

    def candidates(self, kind: CallKind, block_m: int, rows: float) -> Iterator[GemmTile]:
        """Three consumers and whole steps, or two and half steps, which leave room for many rows."""
        if block_m < self.least_block_m:
            return
        block_n, block_k = (128, 64) if block_m >= 256 else (192, 128)
        for group_m, stages, parts, head in itertools.product(
            (0, 1, 2, 4, 8), (3, 4, 5), (1, 2), HEADS.get(block_m, (0,))
        ):
            if block_k == 128 or parts > 1:
                tile = Sm90PersistentTile(block_n, block_k, group_m, 4, stages, parts=parts, head=head)
                if _ring_fits(tile, block_m):
                    yield tile

    def fits(self, tile: GemmTile, form: WeightFormat, block_m: int) -> bool:
        """Whether the block can be cut so, and the ring and the accumulators have room."""
        assert isinstance(tile, Sm90PersistentTile)
        return block_m >= self.least_block_m and tile.cuts(block_m) and _ring_fits(tile, block_m)

    def steps(self, call: LayerCall, tiles: LayerTiles) -> Steps:
        """Down's results of a block are written where its gathered rows were, which are dead by then."""
        from epfuse.stages.combine.launch import launch_combine
        from epfuse.stages.gate_up_down.launch import launch_gate_up_down
        from epfuse.stages.gather.launch import launch_gather
        from epfuse.stages.route.launch import launch_route

        tile, shape, slots, rows = tiles.gate_up, call.shape, call.slots, rows_between(call)
        assert isinstance(tile, Sm90PersistentTile)
        table = call.table(tiles.block_m, tiles.arrivals(shape.hidden, shape.intermediate))
        route_row = slots.new_empty(call.routes)
        lone = LoneTokens.of(call.topk_ids, slots, shape.local_experts, call.out, rows.out_is_free)
        experts = (call.w13, call.w2, table, call.topk_weights, call.activation, tile)
        memory = (rows.y, rows.routed, lone, call.gate_up_bias, call.down_bias)
        routed = (rows.routed, call.topk_ids, slots, shape.local_experts, call.out, route_row)
        launches: tuple[Step, ...] = (
            ("route", partial(launch_route, call.topk_ids, slots, shape.local_experts, table)),
            ("gather", partial(launch_gather, call.hidden, table, shape.top_k, rows.routed, route_row, lone)),
            ("gate_up_down", partial(launch_gate_up_down, rows.routed, *experts, *memory)),
            ("combine", partial(launch_combine, *routed, out_is_free=rows.out_is_free)),
        )
        return Steps(table, launches)

    def step_of(self, stage: Stage, tiles: LayerTiles) -> str:
        """Both are one launch, which runs one alone on a call without the other's weights."""
        return "gate_up_down"


def two_parts(rows: float, largest: int, most: int) -> list[int]:
    """What of TWO_PARTS holds ``rows`` expected rows in one block and is less than half padding, or the largest.

    With a small head padding costs little, so up to two thirds. Rows over the largest take several blocks; below the
    smallest, persistent tiles are not worth trying.

    Args:
        rows: expected rows per expert.
        largest: rows of a block from which on experts take several.
        most: no block has more rows.
    """
    return [
        size
        for size in TWO_PARTS
        if min(rows, largest) <= size <= most and (size < 2 * rows or (size in HEADS and size <= 3 * rows))
    ]


def _ring_fits(tile: Sm90PersistentTile, block_m: int) -> bool:
    """Whether the ring fits shared memory, and the accumulators the registers."""
    ring = tile.num_stages * tile.block_k * (tile.block_n + block_m * 2)
    return ring <= SHARED_BYTES and not (tile.consumers > 2 and block_m >= 256)


# Measured on an H100. A block holds twice the rows that an expert can expect, and costs little where it has no more.
FRAGMENT_TILES = (
    TileRange(72, LayerTiles.both(128, Sm90PersistentTile(192, 128, 2, 4, 3, 1, head=64))),
    TileRange(160, LayerTiles.both(144, Sm90PersistentTile(192, 128, 2, 4, 3, 1))),
    TileRange(288, LayerTiles.both(320, Sm90PersistentTile(128, 64, 1, 4, 4))),
    TileRange(ANY, LayerTiles.both(288, Sm90PersistentTile(128, 64, 1, 4, 5))),
)

SM90_PACKED = Sm90Packed()
