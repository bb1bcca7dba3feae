"""Which tiles are worth trying."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from epfuse.config import LayerShape, Path, WeightFormat
from epfuse.policy.kernels import FP8_PATHS
from epfuse.stages.tiles import PERSISTENT_BLOCK_N, GemmTile, Sm90PersistentTile, Sm90Tile
from epfuse.target import Target
from epfuse.tuning.schema import Stage

LARGEST_BLOCK_M = 128
TWO_PARTS = (48, 80, 96, 144, 160)
"""Row blocks of two powers of two, which persistent tiles take."""
GUESSES = (512, 1024)
"""Values of guess_bytes besides 0: worth nothing to a stage alone, so they are tried on whole calls."""
SPLIT_ROWS = 0.5
"""Rows per expert up to which too few experts are active to fill the GPU, and programs may share a reduction."""
HOPPER_SHARED_BYTES = 232_448
"""Shared memory of a block on sm_90 (CUDA's programming guide, compute capability 9.0)."""


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


def two_part_block_ms(rows: float) -> list[int]:
    """Those of TWO_PARTS that hold ``rows`` expected rows in one block and are less than half padding, or the largest.

    Rows over the largest take several blocks; below the smallest, persistent tiles are not worth trying.
    """
    if rows > TWO_PARTS[-1]:
        return [144, 160]
    return [size for size in TWO_PARTS if rows <= size < 2 * rows]


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
    if path in FP8_PATHS:
        found = list(_fp8(target, block_m))
    elif takes_hopper_tiles(target, weights, shape):
        found = list(_hopper(weights, block_m, rows))
    else:
        found = list(_portable(target, weights, shape, block_m))
    columns = 2 * shape.intermediate if stage is Stage.GATE_UP else shape.hidden
    fitting = [tile for tile in found if tile.block_n <= max(64, columns)]
    random.Random(0).shuffle(fitting)
    return fitting


def _groups(block_m: int) -> tuple[int, ...]:
    """Orders of the blocks: where an expert has few of them, all of them share a column of weights anyway."""
    return (0,) if block_m < 64 else (0, 4, 8)


def _hopper(weights: WeightFormat, block_m: int, rows: float) -> Iterator[GemmTile]:
    packed = weights is WeightFormat.FRAGMENT
    if block_m in TWO_PARTS:
        yield from _persistent(block_m)
        return
    for block_k, (block_n, warps), group_m, stages, split_k in itertools.product(
        (128,) if packed or block_m < 64 else (64, 128),
        ((64, 4), (128, 4), (128, 8), (256, 8)),
        _groups(block_m),
        (2, 3, 4, 5),
        (1, 2, 4, 8) if rows <= SPLIT_ROWS else (1,),
    ):
        ring = stages * block_k * (block_n * (1 if packed else 2) + block_m * 2)
        # a column of 256 weight rows leaves one program a multiprocessor, and too few of them for few rows
        if ring <= HOPPER_SHARED_BYTES and not (block_n == 256 and block_m < 32):
            yield Sm90Tile(block_n, block_k, group_m, warps, stages, split_k=split_k)
    if packed and block_m >= 32:
        yield from _persistent(block_m)


def _persistent(block_m: int) -> Iterator[GemmTile]:
    for group_m, stages, parts in itertools.product((0, 4, 8), (3, 4, 5), (1, 2)):
        if stages * 128 * (PERSISTENT_BLOCK_N + block_m * 2) <= HOPPER_SHARED_BYTES:
            yield Sm90PersistentTile(PERSISTENT_BLOCK_N, 128, group_m, 4, stages, parts=parts)


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
