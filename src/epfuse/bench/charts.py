"""Curves over the token count: as data, with the coordinates that the SVG template needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from epfuse.bench.contender import ContenderKind
from epfuse.bench.measure import Timing
from epfuse.bench.record import BenchRecord, BenchRow

WIDTH, HEIGHT = 900, 380
LEFT, RIGHT, TOP, BOTTOM = 84, 640, 16, 336
"""Edges of the plot in pixels; the legend is to the right of it."""
LEGEND_LINE = 19
LONE_FLOOR = 60
"""Pixels of a floor that has one token count."""
MOST_STYLES = 6
"""Colours for each of: paths, peers, floors. More curves of a kind repeat them."""


@dataclass(frozen=True)
class ChartPoint:
    """One measurement.

    Attributes:
        x, y: token count and value.
        low, high: quartiles of the value.
        hint: what the pointer shows.
    """

    x: float
    y: float
    low: float
    high: float
    hint: str


@dataclass(frozen=True)
class Curve:
    """One line.

    Attributes:
        name: for the legend.
        style: its CSS class: ``path0``.., ``peer0``.., ``floor0``..
        points: ascending in x.
    """

    name: str
    style: str
    points: list[ChartPoint]

    @property
    def is_floor(self) -> bool:
        """Drawn dashed and without marks: it is computed, not measured."""
        return self.style.startswith("floor")


@dataclass(frozen=True)
class Axis:
    """A logarithmic or linear scale between two pixels.

    Attributes:
        low, high: values at its ends.
        start, end: pixels of its ends.
        ticks: values with a label.
        logarithmic: whether equal distances are equal ratios.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: list[float]
    logarithmic: bool = True

    def at(self, value: float) -> float:
        """Pixel of a value."""
        part = (self._scaled(value) - self._scaled(self.low)) / (self._scaled(self.high) - self._scaled(self.low))
        return round(self.start + part * (self.end - self.start), 1)

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.logarithmic else value

    def label(self, value: float) -> str:
        """A tick's text."""
        return f"{value:,.0f}" if value >= 1 else f"{value:g}"


@dataclass(frozen=True)
class CurveChart:
    """Curves over tokens.

    Attributes:
        name: for a file.
        title: says what is shown.
        unit: of the y axis.
        curves: in the order of the legend.
        x, y: the axes.
    """

    name: str
    title: str
    unit: str
    curves: list[Curve]
    x: Axis
    y: Axis
    width: int = field(default=WIDTH, init=False)
    height: int = field(default=HEIGHT, init=False)

    def path(self, curve: Curve) -> str:
        """The ``points`` of an SVG polyline."""
        places = [(self.x.at(point.x), self.y.at(point.y)) for point in curve.points]
        if curve.is_floor and len(places) == 1:  # it has no mark, and a line of one point can't be seen
            ((x, y),) = places
            places = [(x - LONE_FLOOR / 2, y), (x + LONE_FLOOR / 2, y)]
        return " ".join(f"{x},{y}" for x, y in places)

    def legend_y(self, index: int) -> float:
        """Baseline of a legend line."""
        return TOP + 12 + LEGEND_LINE * index


def charts_of(record: BenchRecord) -> list[CurveChart]:
    """For each routing with times: time over tokens beside the floors, and how much of its floor each path reaches."""
    charts = []
    for routing in record.routings:
        rows = [row for row in record.rows if row.routing == routing]
        timed = [row for row in rows if row.time is not None]
        if not timed:
            continue
        slug = routing.replace(":", "-").replace(".", "_")
        curves = _curves(timed, _time_point) + _floor_curves(rows)
        charts.append(
            CurveChart(
                f"time-{slug}",
                f"Time of one call, {routing} routing",
                "µs",
                curves,
                tokens_axis(row.tokens for row in rows),
                time_axis([value for c in curves for p in c.points for value in (p.low, p.high) if value > 0]),
            )
        )
        reached = _curves(timed, _fraction_point)
        charts.append(
            CurveChart(
                f"floor-{slug}",
                f"Part of the floor that is reached, {routing} routing: 100 % is as fast as the roofs allow",
                "%",
                reached,
                tokens_axis(row.tokens for row in rows),
                _percent_axis(max(p.high for curve in reached for p in curve.points)),
            )
        )
    return charts


def _styles(rows: list[BenchRow]) -> dict[str, str]:
    """Label -> style; the same contender has the same colour in every chart."""
    styles: dict[str, str] = {}
    for kind in ContenderKind:
        labels = dict.fromkeys(row.label for row in rows if row.kind is kind)
        styles |= {label: f"{kind.value}{index % MOST_STYLES}" for index, label in enumerate(labels)}
    return styles


def _curves(rows: list[BenchRow], point: Callable[[BenchRow, Timing], ChartPoint]) -> list[Curve]:
    """One for each contender, of a point for each of its times."""
    return [
        Curve(label, style, [point(row, row.time) for row in _ascending(rows, label) if row.time is not None])
        for label, style in _styles(rows).items()
    ]


def _time_point(row: BenchRow, time: Timing) -> ChartPoint:
    hint = f"{row.label}, {row.tokens} tokens: {time.median_us:.1f} µs"
    return ChartPoint(row.tokens, time.median_us, time.q1_us, time.q3_us, hint)


def _fraction_point(row: BenchRow, time: Timing) -> ChartPoint:
    reached, low, high = (100 * row.floor_us / us for us in (time.median_us, time.q3_us, time.q1_us))
    hint = f"{row.label}, {row.tokens} tokens: {reached:.0f} % of its floor of {row.floor_us:.1f} µs"
    return ChartPoint(row.tokens, reached, low, high, hint)


def _floor_curves(rows: list[BenchRow]) -> list[Curve]:
    """One for each different floor: contenders whose weights are as large and whose operands are the same share one."""
    floors: dict[tuple[float, ...], Curve] = {}
    for label in dict.fromkeys(row.label for row in rows):
        mine = _ascending(rows, label)
        key = tuple(round(row.floor_us, 6) for row in mine)
        if key in floors:
            continue
        points = []
        for row in mine:
            hint = f"{row.tokens} tokens: {row.floor_us:.1f} µs, bound by {row.floor_bound}"
            points.append(ChartPoint(row.tokens, row.floor_us, row.floor_us, row.floor_us, hint))
        floors[key] = Curve(f"floor of {label}", f"floor{len(floors) % MOST_STYLES}", points)
    return list(floors.values())


def _ascending(rows: list[BenchRow], label: str) -> list[BenchRow]:
    return sorted((row for row in rows if row.label == label), key=lambda row: row.tokens)


def tokens_axis(tokens: Iterable[int]) -> Axis:
    """From below the least to above the largest token count, with a tick at each that has room for its label.

    The largest has; of two that are too near the smaller has none.
    """
    counts = sorted({float(count) for count in tokens})
    low, high = counts[0] / 1.3, counts[-1] * 1.3  # room for the first and the last mark
    axis = Axis(low, high, LEFT, RIGHT, [])
    for count in reversed(counts):
        if not axis.ticks or axis.at(axis.ticks[0]) - axis.at(count) >= _distance(axis, count, axis.ticks[0]):
            axis.ticks.insert(0, count)
    return axis


def _distance(axis: Axis, *values: float) -> float:
    """Pixels between two ticks whose labels don't touch: half of each, of 7.2 a figure, and a gap."""
    return 3.6 * sum(len(axis.label(value)) for value in values) + 5


def time_axis(values: list[float]) -> Axis:
    """From below the least to above the largest value, with ticks at 1, 2 and 5 times powers of ten."""
    low, high = min(values) / 1.15, max(values) * 1.15
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in (1, 2, 5) if low <= step * 10.0**power <= high]
    return Axis(low, high, BOTTOM, TOP, ticks)


def _percent_axis(top: float) -> Axis:
    """From 0 to 100, or higher if something is: on a CPU the caches beat the roof of its memory."""
    step = 20 if top <= 120 else 10 ** math.ceil(math.log10(top / 10))
    count = max(5, math.ceil(top / step))
    return Axis(0.0, float(step * count), BOTTOM, TOP, [float(step * i) for i in range(count + 1)], logarithmic=False)
