"""Which rows of a benchmark changed by more than the noise since an older record."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from epfuse.arguments import checks_enums
from epfuse.bench.contender import ContenderKind
from epfuse.bench.layers import Layer
from epfuse.bench.record import BenchRecord, BenchRow
from epfuse.errors import ConfigError

LEAST_CHANGE = 0.02
"""A smaller change counts as noise, however little the samples spread: the replays of one run share clocks and memory
layout, two runs' don't."""


class RowVerdict(enum.Enum):
    """What became of a row."""

    FASTER = "faster"
    SLOWER = "slower"
    SAME = "same"
    BROKEN = "broken"
    """It had a time and has none now."""
    MENDED = "mended"
    """It has a time now and had none."""
    FAILS = "fails"
    """It had no time and has none."""
    NEW = "new"
    GONE = "gone"


@checks_enums
@dataclass(frozen=True)
class RowChange:
    """One row, then and now.

    Attributes:
        before, after: None where a record has no such row.
        verdict: what became of it.
        noise_us: by how much the medians may differ without meaning anything; None if one of them is missing.
    """

    before: BenchRow | None
    after: BenchRow | None
    verdict: RowVerdict
    noise_us: float | None = None

    @property
    def changed(self) -> bool:
        """Whether it is worth a line."""
        return self.verdict not in (RowVerdict.SAME, RowVerdict.FAILS)

    @property
    def row(self) -> BenchRow:
        """The newer of the two."""
        row = self.after or self.before
        assert row is not None
        return row

    @property
    def ratio(self) -> float | None:
        """Time now over time then."""
        if self.before is None or self.after is None or self.before.time is None or self.after.time is None:
            return None
        return self.after.time.median_us / self.before.time.median_us

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        row, before, after = self.row, self.before, self.after
        return {
            "contender": row.contender,
            "weights": row.weights,
            "routing": row.routing,
            "tokens": row.tokens,
            "verdict": self.verdict.value,
            "before_us": before.time.median_us if before and before.time else None,
            "after_us": after.time.median_us if after and after.time else None,
            "ratio": self.ratio,
            "noise_us": self.noise_us,
        }


@dataclass(frozen=True)
class RecordComparison:
    """Two records of one layer.

    Attributes:
        before: the older one.
        after: the newer one.
        changes: every row of either.
    """

    before: BenchRecord
    after: BenchRecord
    changes: list[RowChange]

    @property
    def other_device(self) -> bool:
        """Whether the two are from different kinds of device: then changes say nothing of the code."""
        return bool(self.before.device.get("name") != self.after.device.get("name"))

    @property
    def slower(self) -> list[RowChange]:
        """Paths of ours that became slower. A peer that did is shown and no reason to fail."""
        return [c for c in self.changes if c.verdict is RowVerdict.SLOWER and c.row.kind is ContenderKind.PATH]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "before": {"date": self.before.run.get("date"), "commit": self.before.run.get("commit")},
            "other_device": self.other_device,
            "changes": [change.to_json() for change in self.changes],
        }


def check_comparable(before: Layer, after: Layer) -> None:
    """Two records can be compared if their layers have the same sizes, activation and biases; names don't matter.

    Raises:
        ConfigError: one of these differs.
    """
    if (before.shape, before.activation, before.bias) != (after.shape, after.activation, after.bias):
        raise ConfigError(
            f"the older record is of {before.name}, {before.shape}, {before.activation}, biases"
            f" {before.bias.value}; this run is of {after.name}, {after.shape}, {after.activation}, biases"
            f" {after.bias.value}"
        )


def compare_records(before: BenchRecord, after: BenchRecord) -> RecordComparison:
    """Match the rows of two records and judge each.

    Raises:
        ConfigError: they are not of one layer.
    """
    check_comparable(before.layer, after.layer)
    old = {row.key: row for row in before.rows}
    new = {row.key: row for row in after.rows}
    changes = [judge(old.get(key), row) for key, row in new.items()]
    changes += [judge(row, None) for key, row in old.items() if key not in new]
    return RecordComparison(before, after, changes)


def judge(before: BenchRow | None, after: BenchRow | None) -> RowChange:
    """What became of a row: its median must move by more than both interquartile ranges together, and by 2 %."""
    if before is None or after is None:
        return RowChange(before, after, RowVerdict.NEW if before is None else RowVerdict.GONE)
    if before.time is None or after.time is None:
        if before.time is None and after.time is None:
            return RowChange(before, after, RowVerdict.FAILS)
        return RowChange(before, after, RowVerdict.MENDED if before.time is None else RowVerdict.BROKEN)
    then, now = before.time, after.time
    noise = max(then.spread_us + now.spread_us, LEAST_CHANGE * then.median_us)
    moved = now.median_us - then.median_us
    verdict = RowVerdict.SAME if abs(moved) <= noise else RowVerdict.SLOWER if moved > 0 else RowVerdict.FASTER
    return RowChange(before, after, verdict, noise)
