"""Two profiles side by side, phase by phase, a step on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from epfuse.profiling.phases import Phase
from epfuse.profiling.record import Profile, us

UNCLASSIFIED = "unclassified"


@dataclass(frozen=True)
class PhaseChange:
    """One phase of two profiles; calls and ns a step."""

    name: str
    calls: tuple[float, float]
    ns: tuple[float, float]

    @property
    def difference(self) -> float:
        """B minus A, ns."""
        return self.ns[1] - self.ns[0]

    @property
    def ratio(self) -> float | None:
        """B over A; None if A has none."""
        return self.ns[1] / self.ns[0] if self.ns[0] else None


def compare(a: Profile, b: Profile) -> list[PhaseChange]:
    """A row for each phase that one of them has, for what is unclassified, and for the times of the whole step."""
    rows = []
    for phase in Phase:
        pair = [_phase(profile, phase) for profile in (a, b)]
        if any(calls for calls, _ in pair):
            rows.append(_row(phase.value, pair, a, b))
    unclassified = [
        (sum(k.calls for k in profile.unclassified), sum(k.ns for k in profile.unclassified)) for profile in (a, b)
    ]
    if any(calls for calls, _ in unclassified):
        rows.append(_row(UNCLASSIFIED, unclassified, a, b))
    rows.append(_row("all kernels", [(p.kernels_total, p.time.kernel_sum) for p in (a, b)], a, b))
    rows.append(_row("span of the step", [(len(p.window), p.time.span) for p in (a, b)], a, b))
    return rows


def compare_json(a: Profile, b: Profile) -> dict[str, Any]:
    """The rows and both profiles, JSON-ready; microseconds a step."""
    return {
        "compare": [
            {
                "name": row.name,
                "a_calls": row.calls[0],
                "b_calls": row.calls[1],
                "a_us": us(row.ns[0]),
                "b_us": us(row.ns[1]),
                "difference_us": us(row.difference),
                "ratio": row.ratio,
            }
            for row in compare(a, b)
        ],
        "a": a.to_json(),
        "b": b.to_json(),
    }


def _phase(profile: Profile, phase: Phase) -> tuple[int, int]:
    return next(((total.calls, total.ns) for total in profile.phases if total.phase is phase), (0, 0))


def _row(name: str, pair: list[tuple[int, int]], a: Profile, b: Profile) -> PhaseChange:
    steps = len(a.window), len(b.window)
    return PhaseChange(
        name,
        (pair[0][0] / steps[0], pair[1][0] / steps[1]),
        (pair[0][1] / steps[0], pair[1][1] / steps[1]),
    )
