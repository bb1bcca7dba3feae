"""Bar charts as data with coordinates; the templates draw them as inline SVG and escape every text."""

from __future__ import annotations

import math
from dataclasses import dataclass

WIDTH = 480
HEIGHT = 210
LEFT = 64  # room for the y axis' labels
TOP = 12
BOTTOM = HEIGHT - 28  # y of the x axis
PLOT = BOTTOM - TOP
FILL = 0.64  # of a group's width is bars
MOST_LABELS = 16


@dataclass(frozen=True)
class Bar:
    """One rectangle.

    Attributes:
        x, y, width, height: in the chart's pixels, y down.
        series: index into the chart's legend, which is also its colour.
        title: shown by the browser when the pointer rests on it.
    """

    x: float
    y: float
    width: float
    height: float
    series: int
    title: str


@dataclass(frozen=True)
class Tick:
    """A label at a place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A bar chart.

    Attributes:
        title: says what is shown; also the picture's text for those who don't see it.
        legend: names of the series, in the order of their colours.
        x_ticks, y_ticks: labels.
        bars: the rectangles.
    """

    title: str
    legend: list[str]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    bars: list[Bar]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    bottom: int = BOTTOM


def stacked_bars(title: str, groups: list[str], series: dict[str, list[float]], top: float) -> Chart:
    """One bar a group, its series on top of each other from the first one up.

    Args:
        title: of the chart.
        groups: labels of the x axis.
        series: legend -> one non-negative value a group.
        top: value that the y axis must reach; the same one makes several charts comparable.
    """
    ticks = linear_ticks(top)
    scale = PLOT / ticks[-1]
    step = (WIDTH - LEFT) / max(len(groups), 1)
    bars = []
    for column, group in enumerate(groups):
        base = float(BOTTOM)
        for index, (name, values) in enumerate(series.items()):
            height = values[column] * scale
            base -= height
            x = LEFT + (column + (1 - FILL) / 2) * step
            bars.append(Bar(x, base, FILL * step, height, index, f"{group}: {values[column]:g} {name}"))
    return _chart(title, list(series), groups, ticks, bars)


def grouped_bars(title: str, groups: list[str], series: dict[str, list[float]]) -> Chart:
    """Bars side by side within a group.

    Args:
        title: of the chart.
        groups: labels of the x axis.
        series: legend -> one non-negative value a group; one that is not finite has no bar.
    """
    shown = [value for values in series.values() for value in values if math.isfinite(value)]
    ticks = linear_ticks(max(shown, default=0.0))
    scale = PLOT / ticks[-1]
    step = (WIDTH - LEFT) / max(len(groups), 1)
    width = FILL * step / len(series)
    bars = []
    for column, group in enumerate(groups):
        for index, (name, values) in enumerate(series.items()):
            if math.isfinite(values[column]):
                height = values[column] * scale
                x = LEFT + (column + (1 - FILL) / 2) * step + index * width
                hint = f"{group}: {values[column]:.3g} {name}"
                bars.append(Bar(x, BOTTOM - height, width, height, index, hint))
    return _chart(title, list(series), groups, ticks, bars)


def linear_ticks(top: float) -> list[float]:
    """Round values from 0 to at least ``top``, five steps at most."""
    if top <= 0:
        return [0.0, 1.0]
    magnitude = 10 ** math.floor(math.log10(top))
    step = next(m * magnitude / 10 for m in (2, 5, 10, 20) if m * magnitude / 10 * 5 >= top)
    return [step * i for i in range(math.ceil(top / step) + 1)]


def _chart(title: str, legend: list[str], groups: list[str], ticks: list[float], bars: list[Bar]) -> Chart:
    step = (WIDTH - LEFT) / max(len(groups), 1)
    every = math.ceil(len(groups) / MOST_LABELS)
    x_ticks = [Tick(LEFT + (column + 0.5) * step, group) for column, group in enumerate(groups) if column % every == 0]
    y_ticks = [Tick(BOTTOM - value * PLOT / ticks[-1], f"{value:g}") for value in ticks]
    return Chart(title, legend, x_ticks, y_ticks, bars)
