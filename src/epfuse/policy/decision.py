"""What one call will do, and every path that was considered for it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from epfuse.arguments import checks_enums
from epfuse.config import Path, WeightFormat
from epfuse.families.family import Family
from epfuse.stages.tiles import LayerTiles


class PathVerdict(enum.Enum):
    """What became of a path."""

    TAKEN = "taken"
    REFUSED = "refused"
    """Not taken: it can't run, or another one is better; the reason says which."""


@checks_enums
@dataclass(frozen=True)
class Considered:
    """One path and the sentence that speaks for or against it."""

    path: Path
    verdict: PathVerdict
    reason: str


@dataclass(frozen=True)
class TileChoice:
    """The tiles of a call, and where they come from.

    Attributes:
        tiles: of both GEMMs.
        source: one sentence: the measured row and how far the call is from it, or why the target's default is used.
        measured_us: microseconds of gate_up and down together in the rows that were used; None for a default.
    """

    tiles: LayerTiles
    source: str
    measured_us: float | None = None


@checks_enums
@dataclass(frozen=True)
class Decision:
    """What one call will do. Two decisions are equal if they do the same thing, for whatever reasons.

    Attributes:
        path: never AUTO.
        family: whose kernels run; None on the reference path.
        weights: the format that the kernels read; None on the reference path.
        tiles: tiles of the kernels; None on the reference path.
        tile_source: one sentence on where the tiles come from; empty on the reference path.
        measured_us: microseconds of gate_up and down in the tuned rows that the tiles are from; None for defaults.
        considered: every path that was looked at, taken or refused.
    """

    path: Path
    family: Family | None = None
    weights: WeightFormat | None = None
    tiles: LayerTiles | None = None
    tile_source: str = field(default="", compare=False)
    measured_us: float | None = field(default=None, compare=False)
    considered: tuple[Considered, ...] = field(default=(), compare=False)

    @property
    def tile_key(self) -> str | None:
        """The tiles in one word, ``block_m/gate_up/down``; None on the reference path."""
        return None if self.tiles is None else self.tiles.key

    @property
    def reason(self) -> str:
        """The sentence of the path that is taken."""
        return next((entry.reason for entry in self.considered if entry.verdict is PathVerdict.TAKEN), "")

    @property
    def refused(self) -> tuple[Considered, ...]:
        """The paths that are not taken."""
        return tuple(entry for entry in self.considered if entry.verdict is PathVerdict.REFUSED)
