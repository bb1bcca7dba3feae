"""A time model of one expert layer in given tiles, for Hopper: what choosing tiles between measured counts stands on.

`epfuse.hardware.time_model` knows bytes, FLOPs and launches, and nothing of tiles but their rows. This one knows what a
tile adds to that:

* An expert's rows are binomial, and so is the number of experts with any. A block of rows that lacks rows is
  multiplied as far as its kernel goes, and an expert with more rows than a block has them in several, each of which
  dequantises the expert's weights again.
* Programs that share a multiprocessor come in waves; one that is far from full takes as long as its programs' steps do.
  A step takes the longer the fewer stages a program's ring has, because each waits for the memory's latency.
* Persistent programs take tiles in turn; at the end some have none.

A GEMM takes a norm of three times: its weights read once at the memory's rate; what each tile dequantises and
multiplies on a multiprocessor; its steps one after another. A call takes both GEMMs, its rows' way to and from memory,
and its launches. `TileTimes` has the numbers, fitted to a product's measured rows by ``tools/fit_tiles.py``.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from functools import lru_cache

from epfuse.config import LayerShape
from epfuse.stages.tiles import FEW_ROWS, GemmTile, LayerTiles, Sm90PersistentTile, Sm90Tile

WEIGHT_BYTES = 33 / 32
"""Of an MXFP8 weight with its scale."""
SHARED_BYTES = 233_472
"""Shared memory of a multiprocessor, of which each program takes 1024 bytes besides its own."""
REGISTERS = 65_536
SCATTER = 5
"""Standard deviations of an expert's rows that are looked at."""
LEAST_AHEAD = 1.6
"""Stages that are on their way meanwhile in a ring of two: a step is quicker than half of those of a ring of three."""
LEAST_SCATTER = 0.3
"""Active experts, from one call to another, that are looked at."""
NODES = 24
"""Counts of rows that stand for all in between, at least."""


@dataclass(frozen=True)
class TileTimes:
    """A product's numbers. Times in microseconds, sizes in 10^6 bytes or weights.

    Attributes:
        device: as torch names it.
        units: multiprocessors.
        read: MB a microsecond (TB/s) that weights are read at.
        call, packed_call: of a call besides its GEMMs: launches, first and last programs; packed_call is added where
            rows are packed.
        wave: of a program that has the multiprocessor for itself, besides its steps.
        step: of a step of such a program, besides its part of the latency.
        share: of a program that shares a tile's reduction, besides.
        sums: of a MB of partial sums that such programs add up in memory.
        latency: of memory, of which a step has one part for each stage that is on its way meanwhile.
        weight: of 10^6 weights that a multiprocessor dequantises, in tiles (shared, of three consumers, of two).
        column: the same for each row that they are multiplied with.
        store: of 10^6 results of a tile that a multiprocessor stores.
        end: tiles that a multiprocessor waits for the others at the end of a persistent GEMM.
        rows, packed_rows: of a MB of rows that goes to and from memory.
        norm, step_norm: how the times that overlap add up: the exponent of memory and multiprocessors, and of both with
            the steps. 1 is a sum, infinity the larger one.
    """

    device: str
    units: int
    read: float
    call: float
    packed_call: float
    wave: float
    step: float
    latency: float
    share: float
    sums: float
    weight: tuple[float, float, float]
    column: tuple[float, float, float]
    store: float
    end: float
    rows: float
    packed_rows: float
    norm: float
    step_norm: float


@dataclass(frozen=True)
class RowLoad:
    """What a balanced router is expected to bring a rank.

    Attributes:
        active: local experts with a row.
        blocks: blocks of rows, over all experts.
        columns: rows that they are multiplied with, over all blocks, padding included.
        rows: rows.
    """

    active: float
    blocks: float
    columns: float
    rows: float


@lru_cache(maxsize=512)
def expert_rows(tokens: int, share: float) -> tuple[tuple[int, float], ...]:
    """Counts of rows that an expert may get of ``tokens`` tokens, each with its probability.

    Args:
        tokens: T.
        share: K/E, the part of the tokens that choose it.
    """
    mean = tokens * share
    if share >= 1:
        return ((tokens, 1.0),)
    scatter = SCATTER * math.sqrt(mean * (1 - share)) + 2
    low, high = max(0, math.floor(mean - scatter)), min(tokens, math.ceil(mean + scatter))
    counts = range(low, high + 1, max(1, (high - low) // NODES))
    odds = math.log(share / (1 - share))
    logs = [n * odds - math.lgamma(n + 1) - math.lgamma(tokens - n + 1) for n in counts]
    most = max(logs)
    weights = [math.exp(value - most) for value in logs]
    return tuple((n, weight / sum(weights)) for n, weight in zip(counts, weights, strict=True))


@lru_cache(maxsize=4096)
def columns_of(block_m: int, head: int | None) -> tuple[int, ...]:
    """What a block can be multiplied with, ascending; as the kernels' own ``column_steps`` say of persistent tiles.

    Args:
        block_m: rows of a block.
        head: of a persistent tile's block; None for other tiles, whose blocks of 64 rows and more have a half.
    """
    if head is None:
        return (block_m // 2, block_m) if block_m >= 64 else (block_m,)
    if head == block_m:
        return (block_m // 2, block_m)
    rest = block_m - head
    large = head >= 256 and rest >= 32
    more = min(rest, FEW_ROWS) if large or rest >= head else rest
    steps = [rest] * large + [head]
    while more <= rest:
        steps.append(head + more)
        more *= 2
    return tuple(steps)


def load_of(block_m: int, tile: GemmTile, shape: LayerShape, tokens: int) -> RowLoad:
    """What a call's tiles have to do, as expected of a balanced router; of a call that has local rows at all."""
    head = tile.rows_of(block_m)[0] if isinstance(tile, Sm90PersistentTile) else None
    return _load(block_m, head, shape, tokens)


@lru_cache(maxsize=4096)
def _load(block_m: int, head: int | None, shape: LayerShape, tokens: int) -> RowLoad:
    steps = columns_of(block_m, head)
    active = blocks = columns = 0.0
    share = shape.top_k / shape.experts
    for rows, probability in expert_rows(tokens, share):
        if rows:
            full, last = divmod(rows - 1, block_m)
            active += probability
            blocks += probability * (full + 1)
            columns += probability * (full * block_m + next(step for step in steps if step > last))
    local = shape.local_experts
    some = 1 - (1 - active) ** local if active < 1 else 1.0
    factor = local / some
    return RowLoad(active * factor, blocks * factor, columns * factor, tokens * share * factor)


def gemm_us(times: TileTimes, tile: GemmTile, block_m: int, load: RowLoad, outputs: int, inputs: int) -> float:
    """One GEMM, in microseconds.

    Args:
        times: the product's.
        tile: of this GEMM.
        block_m: rows of a block.
        load: of the call.
        outputs: weight rows of an expert.
        inputs: its columns.
    """
    kind = _kind(tile)
    width = -(-outputs // tile.block_n)
    weights = load.active * outputs * inputs * WEIGHT_BYTES / 1e6
    programs = load.blocks * width
    columns = load.columns / load.blocks
    busy = tile.block_n / 1e6 * (inputs * (times.weight[kind] + times.column[kind] * columns) + times.store * columns)
    p, q = times.norm, times.step_norm
    if isinstance(tile, Sm90PersistentTile):
        return float(((weights / times.read) ** p + (busy * (programs / times.units + times.end)) ** p) ** (1 / p))
    split, in_tail = (tile.split_k, tile.tail_split) if isinstance(tile, Sm90Tile) else (1, 1)
    slots, steps = times.units * resident(tile, block_m), -(-inputs // tile.block_k)
    step = times.step + times.latency / max(tile.num_stages - 1, LEAST_AHEAD)
    one_read, one_busy = weights / programs / times.read, busy / times.units

    def waves(tiles: float, shares: int) -> float:
        own_sums = 4e-6 * tile.block_n * block_m if shares > 1 else 0.0
        alone = times.wave + -(-steps // shares) * step + (times.share if shares > 1 else 0.0)

        def wave(filled: float) -> float:
            flow = filled * ((one_read**p + one_busy**p) ** (1 / p) / shares + times.sums * own_sums)
            return float((flow**q + alone**q) ** (1 / q))

        full, left = divmod(tiles * shares, slots)
        return full * wave(slots) + (wave(left) if left else 0.0)

    left = programs % slots if in_tail > 1 else 0.0
    return waves(programs - left, split) + waves(left, in_tail)


def call_us(times: TileTimes, tiles: LayerTiles, shape: LayerShape, tokens: int) -> float:
    """A whole call of a layer with gated experts, in microseconds.

    Args:
        times: the product's.
        tiles: of Hopper's kernels that dequantise MXFP8 weights.
        shape: the layer's sizes.
        tokens: T.
    """
    load = load_of(tiles.block_m, tiles.gate_up, shape, tokens)
    if tiles.packed:
        return load_us(times, tiles, shape, tokens, load)
    return sum(part * load_us(times, tiles, shape, tokens, each) for part, each in _scattered(load, shape))


def load_us(times: TileTimes, tiles: LayerTiles, shape: LayerShape, tokens: int, load: RowLoad) -> float:
    """`call_us` of a call with such a load."""
    moved = 4e-6 * (load.rows * (shape.hidden + shape.intermediate) + tokens * shape.hidden)
    gate_up = gemm_us(times, tiles.gate_up, tiles.block_m, load, 2 * shape.intermediate, shape.hidden)
    down = gemm_us(times, tiles.down, tiles.block_m, load, shape.hidden, shape.intermediate)
    packed = tiles.packed
    launches = times.call + (times.packed_call if packed else 0.0)
    return launches + gate_up + down + moved * (times.packed_rows if packed else times.rows)


@lru_cache(maxsize=4096)
def _scattered(load: RowLoad, shape: LayerShape) -> tuple[tuple[float, RowLoad], ...]:
    """Loads of calls with fewer and with more active experts, and how many are so: a full wave is soon one too many."""
    local = shape.local_experts
    scatter = math.sqrt(3 * load.active * max(0.0, 1 - load.active / local))
    if scatter < LEAST_SCATTER:
        return ((1.0, load),)
    counts = (max(1.0, load.active - scatter), load.active, min(float(local), load.active + scatter))
    return tuple(
        (part, RowLoad(*(count / load.active * value for value in astuple(load))))
        for part, count in zip((1 / 6, 2 / 3, 1 / 6), counts, strict=True)
    )


@lru_cache(maxsize=1024)
def resident(tile: GemmTile, block_m: int) -> int:
    """Programs of such a tile that share a multiprocessor: by shared memory, and by registers as compiled for sm_90."""
    ring = tile.num_stages * tile.block_k * (tile.block_n + 2 * block_m) + 1024
    held = {(64, 4): 64, (128, 4): 108, (128, 8): 60, (256, 8): 116}.get((tile.block_n, tile.num_warps), 128)
    registers = min(255, held + tile.block_n * block_m // (32 * tile.num_warps))
    return max(1, min(SHARED_BYTES // ring, REGISTERS // (32 * tile.num_warps * -(-registers // 8) * 8)))


def _kind(tile: GemmTile) -> int:
    """Index in `TileTimes.weight`."""
    return 0 if not isinstance(tile, Sm90PersistentTile) else 4 - tile.consumers
