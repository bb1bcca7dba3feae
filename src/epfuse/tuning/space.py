"""Which tiles are worth trying."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from epfuse.arguments import checks_enums
from epfuse.config import LayerShape
from epfuse.families.family import CallKind, Family, Stage
from epfuse.stages.tiles import GemmTile, Sm90Tile

GUESSES = (512, 1024)
"""Values of guess_bytes besides 0: worth nothing to a stage alone, so they are tried on whole calls."""


class Space(enum.Enum):
    """How much is tried."""

    FULL = "full"
    """Every tile that the kernels take, within bounds."""
    KNOWN = "known"
    """Tiles that are known to be good for some layer."""


def block_ms(families: Sequence[Family], rows: float) -> list[int]:
    """Row blocks that are worth trying for ``rows`` expected rows per expert."""
    return sorted({size for family in families for size in family.block_ms(rows)})


@checks_enums
def candidates(kind: CallKind, families: Sequence[Family], stage: Stage, block_m: int, rows: float) -> list[GemmTile]:
    """Tiles of one stage in the order in which they are tried.

    The order is shuffled, always alike, so that a search that runs out of time has seen some of every kind.

    Args:
        kind: of the calls, on one path and one format.
        families: that serve them.
        stage: which GEMM.
        block_m: rows of a block.
        rows: expected rows per expert.
    """
    found = [tile for family in families for tile in family.candidates(kind, block_m, rows)]
    fitting = [tile for tile in found if tile.block_n <= max(64, _columns(kind.shape, stage))]
    random.Random(0).shuffle(fitting)
    return fitting


@checks_enums
def known_candidates(
    kind: CallKind, known: Iterable[GemmTile], families: Sequence[Family], stage: Stage, block_m: int
) -> list[GemmTile]:
    """The tiles in ``known`` that can run with block_m.

    Args:
        kind: of the calls, on one path and one format.
        known: tiles of any layer and block.
        families: that serve them.
        stage: which GEMM.
        block_m: rows of a block.
    """
    return [
        tile
        for tile in dict.fromkeys(guessing(tile, 0) for tile in known)
        if tile.block_n <= max(64, _columns(kind.shape, stage))
        and any(type(tile) is family.tile and family.fits(tile, kind.form, block_m) for family in families)
    ]


def guessing(tile: GemmTile, guess_bytes: int) -> GemmTile:
    """The tile with another guess, where its kernel makes any; stages are timed alone without."""
    return replace(tile, guess_bytes=guess_bytes) if isinstance(tile, Sm90Tile) else tile


def _columns(shape: LayerShape, stage: Stage) -> int:
    return 2 * shape.intermediate if stage is Stage.GATE_UP else shape.hidden
