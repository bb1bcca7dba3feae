"""docs/performance.md against the record that its newest table and picture are from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tools.draw_peers import chart_of

DOCS = Path(__file__).parents[2] / "docs"
RECORD = json.loads((DOCS / "records/2026-11-25-h100-peers.json").read_text())
ROWS = {
    "vLLM Marlin, MXFP8, best tiles": "vllm_marlin_tuned",
    "humming 0.1.19 `w8a16`, grouped": "humming_w8a16_grouped",
    "humming 0.1.19 `w8a16`, indexed": "humming_w8a16_indexed",
    "epfuse `w8a16`": "impl",
}


def cells(label: str) -> list[float]:
    """The numbers of a row of the section's table."""
    section = (DOCS / "performance.md").read_text().split("## Beside the fastest peers, in one run")[1]
    line = next(line for line in section.splitlines() if line.startswith(f"| {label} |"))
    return [float(cell) for cell in line.split("|")[2:-1]]


def best(peer: str) -> list[float]:
    """Microseconds of a peer's best configurations, by token count."""
    return [
        row["us"] for row in sorted(RECORD["rows"], key=lambda row: row["T"]) if row["peer"] == peer and row["best"]
    ]


@pytest.mark.parametrize("label", ROWS)
def test_the_table_has_the_record_s_times(label: str) -> None:
    assert cells(label) == [round(us, 1) for us in best(ROWS[label])]


def test_the_table_has_the_record_s_ratios() -> None:
    ours = best("impl")
    fastest = [min(times) for times in zip(*(best(peer) for peer in ROWS.values() if peer != "impl"), strict=True)]
    for shown, us, peer in zip(cells("over the fastest peer"), ours, fastest, strict=True):
        assert shown == pytest.approx(us / peer, abs=0.0051)
    floors = {point.x: point.y for curve in chart_of(RECORD).curves if curve.is_floor for point in curve.points}
    for shown, us, floor in zip(cells("over the floor of this run"), ours, floors.values(), strict=True):
        assert shown == pytest.approx(us / floor, abs=0.0051)


def test_the_picture_is_the_record_s() -> None:
    pytest.importorskip("jinja2")
    from epfuse.bench.page import chart_svg

    assert (DOCS / "performance-h100.svg").read_text() == chart_svg(chart_of(RECORD))
