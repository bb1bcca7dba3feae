from __future__ import annotations

import re
from itertools import pairwise

import pytest

from epfuse.bench.charts import BOTTOM, LEFT, RIGHT, TOP, Axis, charts_of, tokens_axis
from tests.bench.records import peer, record, row

TWO = record(
    row(tokens=1, us=250),
    row(tokens=64, us=400),
    row("bf16", tokens=64, us=800, weights="dense", floor_us=390.0),
    peer("vLLM Marlin", 500, tokens=1),
    peer("vLLM Marlin", None, tokens=64, failure="RuntimeError"),
)


def test_curves_of_paths_peers_and_floors() -> None:
    time, fraction = charts_of(TWO)
    assert [(curve.name, curve.style, len(curve.points)) for curve in time.curves] == [
        ("w8a16 fragment", "path0", 2),
        ("bf16 dense", "path1", 1),
        ("vLLM Marlin bf16", "peer0", 1),
        ("floor of w8a16 fragment", "floor0", 2),
        ("floor of bf16 dense", "floor1", 1),
    ]
    assert [point.y for point in fraction.curves[0].points] == pytest.approx([80.0, 50.0])
    assert not any(curve.is_floor for curve in fraction.curves)
    assert (time.name, fraction.name) == ("time-uniform", "floor-uniform")


def test_everything_lies_inside_the_plot() -> None:
    for chart in charts_of(TWO):
        for curve in chart.curves:
            for x, y in re.findall(r"(\S+),(\S+)", chart.path(curve)):
                assert LEFT <= float(x) <= RIGHT
                assert TOP <= float(y) <= BOTTOM
        assert len(chart.y.ticks) >= 2


def test_a_logarithmic_axis() -> None:
    axis = Axis(1.0, 100.0, 0.0, 200.0, [1.0])
    assert (axis.at(1.0), axis.at(10.0), axis.at(100.0)) == (0.0, 100.0, 200.0)


def test_labels_of_close_token_counts_are_left_out() -> None:
    many = record(*(row(tokens=tokens) for tokens in (1, 1000, 1001, 1100, 8192)))
    assert charts_of(many)[0].x.ticks == [1, 1100, 8192]


def test_long_labels_of_tokens_have_room() -> None:
    axis = tokens_axis([1, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384])
    spans = [(axis.at(tick), 3.5 * len(axis.label(tick))) for tick in axis.ticks]
    assert {1.0, 512.0, 16384.0} <= set(axis.ticks)
    assert all(left + half < right - other for (left, half), (right, other) in pairwise(spans))


def test_one_point_and_no_point() -> None:
    assert len(charts_of(record(row()))) == 2
    assert charts_of(record(row(us=None))) == []


def test_more_than_the_floor_allows_still_fits() -> None:
    fraction = charts_of(record(row(us=20.0)))[1]
    assert fraction.curves[0].points[0].y == pytest.approx(1000.0)
    assert fraction.y.high >= 1000.0
    assert len(fraction.y.ticks) <= 12
