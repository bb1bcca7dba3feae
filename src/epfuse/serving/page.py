"""A run as one HTML page that needs nothing but itself; raw files are linked relative to the run's folder."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from epfuse.report.charts import linear_ticks
from epfuse.report.page import render
from epfuse.serving.done import End
from epfuse.serving.export import measurements
from epfuse.serving.facts import differences
from epfuse.serving.matrix import short_lengths
from epfuse.serving.phases import phase_table
from epfuse.serving.record import LegRecord, PointRecord, RunRecord
from epfuse.serving.results import MeasuredLoad, Spread
from epfuse.serving.verdict import PointVerdict, Word

WIDTH, HEIGHT = 520, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 508, 12, 268
"""Edges of the chart's plot, pixels."""
STYLES = 6
INTERVAL_WIDTH = 160
GOOD: dict[str, str] = {
    End.DONE: "good",
    End.FAILED: "bad",
    End.GATED_OUT: "bad",
    "cancelled": "bad",
    "unreadable": "bad",
}
VERDICTS = {Word.FASTER: "good", Word.SLOWER: "bad"}


@dataclass(frozen=True)
class Mark:
    """A measurement in the chart: pixels, and what the pointer shows."""

    x: float
    y: float
    hint: str


@dataclass(frozen=True)
class Series:
    """One line: lengths, layout and arm."""

    name: str
    style: str
    marks: list[Mark]

    @property
    def path(self) -> str:
        """The ``points`` of an SVG polyline."""
        return " ".join(f"{mark.x},{mark.y}" for mark in self.marks)


def serve_page(record: RunRecord, made: float) -> str:
    """The page.

    Args:
        record: of the run.
        made: when, seconds since 1970.
    """
    common, differing = differences((point.name, point.arms, point.facts) for point in record.points)
    states = [point.state for point in record.points]
    return render(
        "serve.html.j2",
        run=record.run,
        made=datetime.fromtimestamp(made, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        created=datetime.fromtimestamp(record.run.created, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        ok=record.ok,
        faults=record.faults,
        counts={state: states.count(state) for state in dict.fromkeys(states)},
        good=GOOD,
        unit=unit(record),
        chart=_chart(record),
        verdicts=_verdicts(record),
        points=[_point_row(point) for point in record.points],
        legs=[_leg_row(point, leg) for point in record.points for leg in point.legs],
        phases=_phases(record),
        gates=[(p.name, leg.leg.arm, leg.leg.number, leg.leg.gate) for p in record.points for leg in p.legs
               if leg.leg.gate is not None],
        common=common,
        differing=differing,
        left=LEFT, right=RIGHT, bottom=BOTTOM, width=WIDTH, height=HEIGHT, interval_width=INTERVAL_WIDTH,
    )  # fmt: skip


def unit(record: RunRecord) -> str:
    """What a throughput is divided by; a server on a CPU has ranks and no GPU."""
    return "GPU" if any(point.job is not None and point.job.gpus for point in record.points) else "rank"


def _chart(record: RunRecord) -> dict[str, Any] | None:
    """Tokens a second and GPU (`unit`) over tokens a second and user; one line for lengths, layout and arm."""
    lines: dict[str, list[tuple[int, float, float, str]]] = {}
    for point, job, arm, legs in measurements(record):
        users = [user for leg in legs if (user := leg.per_user) is not None]
        if not users:
            continue
        shape = job.point
        user, gpu = statistics.median(users), statistics.median(leg.total_throughput for leg in legs) / max(shape.tp, 1)
        name = f"{short_lengths(shape.isl, shape.osl)}, {arm}"
        hint = f"{point.name}, {arm}: {user:.3g} tokens/s/user, {gpu:,.3g} tokens/s/{unit(record)}"
        lines.setdefault(name, []).append((shape.concurrency, user, gpu, hint))
    if not lines:
        return None
    every = [place for places in lines.values() for place in places]
    x_ticks, y_ticks = linear_ticks(max(p[1] for p in every)), linear_ticks(max(p[2] for p in every))

    def x(value: float) -> float:
        return round(LEFT + value / x_ticks[-1] * (RIGHT - LEFT), 1)

    def y(value: float) -> float:
        return round(BOTTOM - value / y_ticks[-1] * (BOTTOM - TOP), 1)

    series = [
        Series(name, f"path{number % STYLES}", [Mark(x(u), y(g), hint) for _, u, g, hint in sorted(places)])
        for number, (name, places) in enumerate(lines.items())
    ]
    return {
        "series": series,
        "x": [(x(tick), f"{tick:g}") for tick in x_ticks],
        "y": [(y(tick), f"{tick:,g}") for tick in y_ticks],
    }


def _verdicts(record: RunRecord) -> list[dict[str, Any]]:
    """Rows of the A/B, all intervals on one scale."""
    sizes = [abs(edge) for verdict in record.verdicts.values() for edge in _edges(verdict)]
    scale = min(max(sizes, default=0.0), 1.0) or 1.0
    rows = []
    for name, verdict in record.verdicts.items():
        edges = [_place(edge, scale) for edge in _edges(verdict)]
        rows.append(
            {
                "point": name,
                "verdict": verdict,
                "style": VERDICTS.get(verdict.word, "soft"),
                "edges": edges or None,
                "zero": INTERVAL_WIDTH / 2,
            }
        )
    return rows


def _edges(verdict: PointVerdict) -> list[float]:
    return [edge for edge in (verdict.low, verdict.effect, verdict.high) if edge is not None]


def _place(value: float, scale: float) -> float:
    part = max(-1.0, min(1.0, value / scale))
    return round(INTERVAL_WIDTH / 2 * (1 + 0.94 * part), 1)


def _point_row(point: PointRecord) -> dict[str, Any]:
    found = point.point
    arms: dict[str, list[MeasuredLoad]] = {}
    for leg, measured in point.measured:
        arms.setdefault(leg.leg.arm, []).append(measured)
    ranks = 1 if found is None else max(found.tp, 1)
    return {
        "name": point.name,
        "state": point.state,
        "reason": point.reason,
        "shape": None if found is None else f"c{found.concurrency}, tp {found.tp}, ep {found.ep}",
        "arms": [(arm, _arm_figures(legs, ranks)) for arm, legs in arms.items()],
        "files": _links(point.files),
    }


def _arm_figures(legs: list[MeasuredLoad], ranks: int) -> list[str]:
    steady = [leg.steady.total for leg in legs if leg.steady is not None]
    users = [user for leg in legs if (user := leg.per_user) is not None]
    return [
        _figure(statistics.median(leg.total_throughput for leg in legs) / ranks),
        _figure(statistics.median(steady) / ranks if steady else None),
        _figure(statistics.median(leg.output_throughput for leg in legs) / ranks),
        _figure(statistics.median(users) if users else None),
        str(len(legs)),
    ]


def _leg_row(point: PointRecord, record: LegRecord) -> dict[str, Any]:
    measured = record.measured
    requests = steady = ""
    if measured is not None:
        requests = f"{measured.completed}" + (f" (+{measured.failed} failed)" if measured.failed else "")
        window = measured.steady
        steady = "none" if window is None else f"{window.end - window.start:.3g} of {measured.duration:.3g} s"
    return {
        "point": point.name,
        "leg": record.leg,
        "fault": record.fault or record.leg.reason,
        "bad": bool(record.fault) or record.leg.state is not End.DONE,
        "requests": requests,
        "steady": steady,
        "spreads": [] if measured is None else [_spread(spread) for spread in measured.spreads.values()],
        "files": _links(record.files),
    }


def _phases(record: RunRecord) -> dict[str, Any] | None:
    """Milliseconds of a step that each phase takes, a column for each point and arm that was traced."""
    traced = [(point, arm, phases) for point in record.points for arm, phases in point.profiled.items()]
    if not traced:
        return None
    columns = [phases for _, _, phases in traced]
    largest = [max((phase.ms for phase in column.phases), default=0.0) for column in columns]
    arms = len({arm for _, arm, _ in traced}) > 1
    rows = []
    for row in phase_table(columns):
        cells = [
            None if cell is None else (_figure(cell.ms), f"{cell.calls:.4g} calls a step", cell.ms == most)
            for cell, most in zip(row.cells, largest, strict=True)
        ]
        rows.append((row.name, cells))
    return {
        "columns": [[*_short(point), *([arm] if arms else [])] for point, arm, _ in traced],
        "rows": rows,
        "totals": [(_figure(column.ms), column.steps) for column in columns],
    }


def _short(point: PointRecord) -> list[str]:
    """Lengths and concurrency, and the layout; lines of a narrow column's head."""
    found = point.point
    if found is None:
        return [point.name]
    layout = f"tp{found.tp}" + (f" ep{found.ep}" if found.ep > 1 else "")
    return [f"{short_lengths(found.isl, found.osl)} c{found.concurrency}", layout]


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return " / ".join(_figure(1e3 * spread.percentiles[share]) for share in (50.0, 90.0, 99.0))


def _figure(value: float | None) -> str:
    """Three digits, and all of those before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _links(files: dict[str, str]) -> list[tuple[str, str]]:
    """Words and links; ``./`` keeps a colon in a name from being taken for a scheme."""
    return [(word, "./" + quote(path)) for word, path in files.items()]
