"""Which tiles are worth trying."""

from __future__ import annotations

import enum
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

from epfuse.arguments import checks_enums
from epfuse.config import LayerShape, Path, WeightFormat
from epfuse.policy.kernels import FP8_PATHS
from epfuse.stages.tiles import GemmTile, Sm90PersistentTile, Sm90Tile
from epfuse.target import Target
from epfuse.tuning.schema import Stage

LARGEST_BLOCK_M = 128
TWO_PARTS = (96, 144, 160, 272, 288, 320)
"""Row blocks of two powers of two, which persistent tiles take. Not 48 and 80: for 32 and 64 rows an expert, 96 and 128
are a hundredth slower than those if the router is even, and up to 40 % faster if it is not (docs/performance.md)."""
HEADS = {64: (0, 32), 96: (0, 32), 128: (0, 64)}
"""Heads of these row blocks in persistent tiles: with a small one they cost little where experts have few rows."""
LARGEST_TWO_PARTS = {WeightFormat.FRAGMENT: 272, WeightFormat.ROW_FP8: 144}
"""From here on the rows of an expert take several blocks, of this size or larger."""
MOST_FP8_ROWS = {128: 192, 192: 144}
"""Rows of a block that the registers hold by block_n, for FP8 rows: a step's sums stand beside the sums of all."""
GUESSES = (512, 1024)
"""Values of guess_bytes besides 0: worth nothing to a stage alone, so they are tried on whole calls."""
SPLIT_ROWS = 0.5
"""Rows per expert up to which too few experts are active to fill the GPU, and programs may share a reduction."""
HOPPER_SHARED_BYTES = 232_448
"""Shared memory of a block on sm_90 (CUDA's programming guide, compute capability 9.0)."""


class Space(enum.Enum):
    """How much is tried."""

    FULL = "full"
    """Every tile that the kernels take, within bounds."""
    KNOWN = "known"
    """Tiles that are known to be good for some layer."""


@checks_enums
def takes_hopper_tiles(target: Target, weights: WeightFormat, shape: LayerShape) -> bool:
    """Whether the Hopper kernels read ``weights`` of this shape."""
    whole = shape.hidden % 128 == shape.intermediate % 128 == 0
    return weights is WeightFormat.FRAGMENT or (target is Target.SM90 and weights is WeightFormat.DENSE and whole)


def block_ms(rows: float, least: int) -> list[int]:
    """Row blocks for ``rows`` expected rows per expert: the first power of two that holds them, and its neighbours.

    Where even the least block is mostly padding there is no other.
    """
    if rows <= least / 4:
        return [least]
    fitting = least
    while fitting < min(rows, LARGEST_BLOCK_M):
        fitting *= 2
    return [size for size in (fitting // 2, fitting, fitting * 2) if least <= size <= LARGEST_BLOCK_M]


@checks_enums
def two_part_block_ms(rows: float, weights: WeightFormat = WeightFormat.FRAGMENT) -> list[int]:
    """Those of TWO_PARTS that hold ``rows`` expected rows in one block and are less than half padding, or the largest.

    With a small head padding costs little, so up to two thirds. Rows over the largest take several blocks; below the
    smallest, persistent tiles are not worth trying. Weights that no persistent tile reads have none.
    """
    if weights not in LARGEST_TWO_PARTS:
        return []
    most = max(MOST_FP8_ROWS.values()) if weights is WeightFormat.ROW_FP8 else max(TWO_PARTS)
    return [
        size
        for size in TWO_PARTS
        if min(rows, LARGEST_TWO_PARTS[weights]) <= size <= most
        and (size < 2 * rows or (size in HEADS and size <= 3 * rows))
    ]


@checks_enums
def candidates(
    target: Target, path: Path, weights: WeightFormat, shape: LayerShape, stage: Stage, block_m: int, rows: float
) -> list[GemmTile]:
    """Tiles of one stage in the order in which they are tried.

    The order is shuffled, always alike, so that a search that runs out of time has seen some of every kind.

    Args:
        target: a GPU.
        path: what runs.
        weights: the format that it reads.
        shape: the layer's sizes.
        stage: which GEMM.
        block_m: rows of a block.
        rows: expected rows per expert.
    """
    if weights is WeightFormat.ROW_FP8:
        found = list(_row_fp8(block_m))
    elif path in FP8_PATHS:
        found = list(_fp8(target, block_m))
    elif takes_hopper_tiles(target, weights, shape):
        found = list(_hopper(weights, block_m, rows))
    else:
        found = list(_portable(target, weights, shape, block_m))
    fitting = [tile for tile in found if tile.block_n <= max(64, _columns(shape, stage))]
    random.Random(0).shuffle(fitting)
    return fitting


@checks_enums
def known_candidates(
    known: Iterable[GemmTile], weights: WeightFormat, shape: LayerShape, stage: Stage, block_m: int
) -> list[GemmTile]:
    """Those of ``known`` that can run with block_m.

    Args:
        known: tiles of any layer and block.
        weights: the format that the kernels read.
        shape: the layer's sizes.
        stage: which GEMM.
        block_m: rows of a block.
    """
    columns = _columns(shape, stage)
    return [
        tile
        for tile in dict.fromkeys(guessing(tile, 0) for tile in known)
        if tile.block_n <= max(64, columns) and _runs(tile, weights, block_m)
    ]


def guessing(tile: GemmTile, guess_bytes: int) -> GemmTile:
    """The tile with another guess, where its kernel makes any; stages are timed alone without."""
    return replace(tile, guess_bytes=guess_bytes) if isinstance(tile, Sm90Tile) else tile


def _columns(shape: LayerShape, stage: Stage) -> int:
    return 2 * shape.intermediate if stage is Stage.GATE_UP else shape.hidden


def _runs(tile: GemmTile, weights: WeightFormat, block_m: int) -> bool:
    """Whether a Hopper tile can be launched with block_m; of other tiles the compiler has the last word anyway."""
    if isinstance(tile, Sm90PersistentTile):
        if weights is WeightFormat.ROW_FP8:
            return tile.cuts(block_m) and _row_fp8_ring(tile, block_m)
        return block_m >= 32 and tile.cuts(block_m) and _persistent_ring(tile, block_m)
    if isinstance(tile, Sm90Tile):
        shared = tile.split_k > 1 and block_m > 16  # where there are rows, there are tiles enough
        return block_m.bit_count() == 1 and not shared and _ring(tile, weights, block_m)
    return block_m >= 16 and block_m.bit_count() == 1


def _ring(tile: Sm90Tile, weights: WeightFormat, block_m: int) -> bool:
    """Whether the ring fits shared memory, and the tile is not wasted on few rows."""
    bytes_of_weight = 1 if weights is WeightFormat.FRAGMENT else 2
    ring = tile.num_stages * tile.block_k * (tile.block_n * bytes_of_weight + block_m * 2)
    # a column of 256 weight rows leaves one program a multiprocessor, and too few of them for few rows
    return ring <= HOPPER_SHARED_BYTES and not (tile.block_n == 256 and block_m < 32)


def _persistent_ring(tile: Sm90PersistentTile, block_m: int) -> bool:
    """Whether the ring fits shared memory, and the accumulators the registers."""
    ring = tile.num_stages * tile.block_k * (tile.block_n + block_m * 2)
    return ring <= HOPPER_SHARED_BYTES and not (tile.consumers > 2 and block_m >= 256)


def _row_fp8_ring(tile: Sm90PersistentTile, block_m: int) -> bool:
    """The same for FP8 rows."""
    ring = tile.num_stages * tile.block_k * (tile.block_n + block_m)
    return tile.parts == 1 and ring <= HOPPER_SHARED_BYTES and block_m <= MOST_FP8_ROWS[tile.block_n]


def _groups(block_m: int) -> tuple[int, ...]:
    """Orders of the blocks: where an expert has few of them, all of them share a column of weights anyway."""
    return (0,) if block_m < 64 else (0, 4, 8)


def _hopper(weights: WeightFormat, block_m: int, rows: float) -> Iterator[GemmTile]:
    packed = weights is WeightFormat.FRAGMENT
    if block_m.bit_count() > 1:
        yield from _persistent(block_m)
        return
    for block_k, (block_n, warps), group_m, stages, split_k in itertools.product(
        (128,) if packed or block_m < 64 else (64, 128),
        ((64, 4), (128, 4), (128, 8), (256, 8)),
        _groups(block_m),
        (2, 3, 4, 5),
        (1, 2, 4, 8) if rows <= SPLIT_ROWS else (1,),
    ):
        tile = Sm90Tile(block_n, block_k, group_m, warps, stages, split_k=split_k)
        if _ring(tile, weights, block_m):
            yield tile
    if packed and block_m >= 32:
        yield from _persistent(block_m)


def _persistent(block_m: int) -> Iterator[GemmTile]:
    for group_m, stages, parts, head in itertools.product((0, 1, 2, 4, 8), (3, 4, 5), (1, 2), HEADS.get(block_m, (0,))):
        # three consumers and whole stages, or two and half stages, which leave room for many rows
        block_n, block_k = (128, 64) if block_m >= 256 else (192, 128)
        if block_k == 128 or parts > 1:
            tile = Sm90PersistentTile(block_n, block_k, group_m, 4, stages, parts=parts, head=head)
            if _persistent_ring(tile, block_m):
                yield tile


def _row_fp8(block_m: int) -> Iterator[GemmTile]:
    for block_n, group_m, stages, head in itertools.product(
        (128, 192), (0, 1, 2, 4), (4, 5, 6), HEADS.get(block_m, (0,))
    ):
        tile = Sm90PersistentTile(block_n, 128, group_m, 4, stages, parts=1, head=head)
        if tile.cuts(block_m) and _row_fp8_ring(tile, block_m):
            yield tile


def _portable(target: Target, weights: WeightFormat, shape: LayerShape, block_m: int) -> Iterator[GemmTile]:
    wide = (64, 128, 256) if weights is WeightFormat.DENSE else (64, 128)
    for block_n, block_k, group_m, warps, stages in itertools.product(
        (32, 64, 128, 256), wide, _groups(block_m), (4, 8), (2,) if target.is_amd else (3, 4)
    ):
        if block_k <= max(64, shape.hidden) and block_m * block_n >= 512 * warps // 4 and block_n * block_k <= 1 << 15:
            yield GemmTile(block_n, block_k, group_m, warps, stages)


def _fp8(target: Target, block_m: int) -> Iterator[GemmTile]:
    for block_n, group_m, warps, stages in itertools.product(
        (64, 128, 256), _groups(block_m), (2, 4, 8), (2,) if target.is_amd else (3, 4)
    ):
        if block_m * block_n <= 128 * 128:
            yield GemmTile(block_n, 128, group_m, warps, stages)  # whole groups of 128
