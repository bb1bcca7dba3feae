from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epfuse.report.charts import BOTTOM, TOP, grouped_bars, linear_ticks, stacked_bars


@given(st.floats(1e-12, 1e12))
def test_ticks_reach_the_top_in_at_most_five_steps(top: float) -> None:
    ticks = linear_ticks(top)
    assert ticks[0] == 0
    assert ticks[-1] >= top * (1 - 1e-9)
    assert 2 <= len(ticks) <= 6
    assert ticks == sorted(ticks)


@pytest.mark.parametrize("top", [0.0, -1.0])
def test_nothing_to_show_still_has_an_axis(top: float) -> None:
    assert linear_ticks(top) == [0.0, 1.0]


def test_a_stack_ends_where_the_next_part_begins() -> None:
    chart = stacked_bars("rows", ["0", "1"], {"useful": [3.0, 0.0], "padding": [1.0, 4.0]}, top=4.0)
    useful, padding = chart.bars[:2]
    assert useful.y + useful.height == BOTTOM
    assert padding.y + padding.height == useful.y
    assert padding.y == pytest.approx(TOP)
    assert chart.bars[0].title == "0: 3 useful"


def test_a_value_that_is_not_finite_has_no_bar() -> None:
    chart = grouped_bars("error", ["a", "b"], {"ours": [math.nan, 1.0], "theirs": [2.0, math.inf]})
    assert [bar.title for bar in chart.bars] == ["a: 2 theirs", "b: 1 ours"]


def test_many_groups_get_some_labels() -> None:
    chart = stacked_bars("rows", [str(rank) for rank in range(128)], {"useful": [1.0] * 128}, top=1.0)
    assert len(chart.x_ticks) == 16
    assert len(chart.bars) == 128
