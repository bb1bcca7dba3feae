"""The record as one HTML page, and its curves as pictures."""

from __future__ import annotations

from typing import Any

from epfuse.bench.charts import BOTTOM, LEFT, RIGHT, CurveChart, charts_of
from epfuse.bench.compare import RecordComparison
from epfuse.bench.figures import change_figures, describe_roofs, environment_of, row_figures, unit_of
from epfuse.bench.record import BenchRecord
from epfuse.report.page import render

EDGES = {"left": LEFT, "right": RIGHT, "bottom": BOTTOM}


def bench_page(record: BenchRecord, comparison: RecordComparison | None = None) -> str:
    """A self-contained page: roofs, curves, every row, what changed, who took part, on which machine."""
    points: list[tuple[str, list[list[dict[str, Any]]]]] = []
    for routing in record.routings:
        counts = dict.fromkeys(row.tokens for row in record.rows if row.routing == routing)
        points.append((routing, [row_figures(record, routing, tokens) for tokens in counts]))
    changes = comparison.changes if comparison else []
    return render(
        "bench.html.j2",
        record=record,
        shape=record.layer.shape,
        facts=describe_roofs(record.roofs),
        charts=charts_of(record),
        points=points,
        comparison=comparison,
        changes=[change_figures(change) for change in changes if change.changed],
        same=sum(not change.changed for change in changes),
        prefix=unit_of(record)[1],
        environment=environment_of(record),
        **EDGES,
    )


def chart_svg(chart: CurveChart) -> str:
    """One chart as an SVG file."""
    return render("bench_curves.svg.j2", chart=chart, **EDGES).lstrip()
