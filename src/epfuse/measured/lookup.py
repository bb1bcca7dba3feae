"""Which measured rows a call may use, and how far it is from them.

Distance is counted in rows per expert, T*K/E, which is what tiles follow. Up to a factor of 1.5 a row is *close*: any
row that is close comes before any that is not, so that a gap in one product's rows is filled from another's. Up to two
it is *near*: used if it is this product's own. A farther one is not used. A row is *foreign* if it was measured on
another product of the same target, or for a layer with another L, E or K; its tile is used and its time is not. One of
a layer with biases for one without, or the other way round, serves in the same way, and comes after the same product's
rows for the same sizes that have the call's: biases are added after the products and move no more memory to speak of,
so that a product or sizes count for more. A layer with another H or I has nothing to say,
nor has one whose few wide experts are too few tiles for the GPU for one that has enough, or the other way round.

If n rows an expert are expected, most experts get at most n + sqrt(n). If a row's block had room for so many when it
was measured, and has none for the call's, many experts would need a second block for a few rows: the row does not serve
that call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from epfuse.arguments import checks_enums
from epfuse.config import Bias, LayerShape, Path, WeightFormat
from epfuse.families.family import Stage
from epfuse.measured.schema import Measurement, TileRow
from epfuse.measured.store import shipped
from epfuse.stages.tiles import LayerTiles, has_few_tiles
from epfuse.target import Target

CLOSE = 1.5
"""Rows per expert of a call over a row's, or the other way round, up to which any product's row is used."""
NEAR = 2.0
"""The same, up to which this product's own row is used where none is close."""
MORE_EXPERTS = 2
"""Local experts of a row's layer over the call's, up to which the row is used."""


@dataclass(frozen=True)
class MeasuredTiles:
    """The best tiles that were measured at one token count.

    Attributes:
        tokens: T of the measurement.
        rows: expected rows per expert, T*K/E.
        tiles: of both stages.
        microseconds: of the call, or of both stages where only they were timed.
    """

    tokens: int
    rows: float
    tiles: LayerTiles
    microseconds: float

    def factor(self, rows: float) -> float:
        """How far a call with ``rows`` rows per expert is from this point: 1 is exact, 2 is twice or half."""
        return max(rows / self.rows, self.rows / rows)

    def fits(self, rows: float) -> bool:
        """Whether a block holds the rows of most experts, or did not when the point was measured."""
        return rows <= self.held or self.rows > self.held

    @property
    def held(self) -> float:
        """Expected rows per expert that a block holds with their scatter: n + sqrt(n) = block_m."""
        return ((math.sqrt(1 + 4 * self.tiles.block_m) - 1) / 2) ** 2


@checks_enums
@dataclass(frozen=True)
class LayerMeasurements:
    """One layer's measurements on one device.

    Attributes:
        device: the product that measured.
        shape: the layer.
        bias: of both projections or none.
        same_device, same_shape, same_bias: whether they are the call's.
        date: of the measurement, ISO.
        points: ascending in tokens.
    """

    device: str
    shape: LayerShape
    bias: Bias
    same_device: bool
    same_shape: bool
    same_bias: bool
    date: str
    points: tuple[MeasuredTiles, ...]

    @property
    def is_foreign(self) -> bool:
        """Whether it is another device's or of other sizes."""
        return not (self.same_device and self.same_shape)

    @property
    def is_own(self) -> bool:
        """Whether its times are the call's."""
        return self.same_bias and not self.is_foreign

    def nearest(self, rows: float) -> MeasuredTiles:
        """The point with the smallest factor, of two the smaller one, among those that fit if any does."""
        fitting = [point for point in self.points if point.fits(rows)]
        return min(fitting or self.points, key=lambda point: (point.factor(rows), point.tokens))


@dataclass(frozen=True)
class FoundTiles:
    """A row that a call may use.

    Attributes:
        source: where it is from.
        point: the row.
        factor: how far away it is.
    """

    source: LayerMeasurements
    point: MeasuredTiles
    factor: float


@checks_enums
def sources(
    target: Target, device_name: str, path: Path, weights: WeightFormat, shape: LayerShape, bias: Bias = Bias.NONE
) -> tuple[LayerMeasurements, ...]:
    """All that was measured for layers of this H and I: this device first, then these sizes, these biases, the newest.

    Args:
        target: a GPU.
        device_name: the product that will run the call.
        path: what will run.
        weights: the format that it reads.
        shape: the layer's sizes.
        bias: of both projections or none.
    """
    found, has_few = [], has_few_tiles(shape)
    for gate_up, down in _pairs(target, path, weights):
        measured = gate_up.shape
        if (measured.hidden, measured.intermediate) != (shape.hidden, shape.intermediate):
            continue
        if measured.local_experts > MORE_EXPERTS * shape.local_experts or has_few_tiles(measured) is not has_few:
            continue
        if points := _points(gate_up, down, measured):
            same = gate_up.device == device_name, measured == shape, gate_up.bias is bias
            date = gate_up.date.isoformat()
            found.append(LayerMeasurements(gate_up.device, measured, gate_up.bias, *same, date, points))
    found.sort(key=lambda source: source.date, reverse=True)
    found.sort(key=lambda source: (not source.same_device, not source.same_shape, not source.same_bias))
    return tuple(found)


@checks_enums
def all_points(target: Target, device_name: str, path: Path, weights: WeightFormat) -> Iterator[MeasuredTiles]:
    """The best tiles of every count that one product has for a path, of any layer that the time model is asked of."""
    for gate_up, down in _pairs(target, path, weights):
        if gate_up.device == device_name and not has_few_tiles(gate_up.shape):
            yield from _points(gate_up, down, gate_up.shape)


def _pairs(target: Target, path: Path, weights: WeightFormat) -> Iterator[tuple[Measurement, Measurement]]:
    """Of each layer that both stages were measured for on a path: gate_up's measurement, and down's."""
    downs = {measurement.key: measurement for measurement in shipped(target, Stage.DOWN).measurements}
    for gate_up in shipped(target, Stage.GATE_UP).measurements:
        if (gate_up.path, gate_up.weights) == (path, weights) and gate_up.key in downs:
            yield gate_up, downs[gate_up.key]


def find(choices: tuple[LayerMeasurements, ...], rows: float) -> FoundTiles | None:
    """The first source's nearest point that is close, or the next one's; else this product's that is near; or None."""
    for bound, sources_within in ((CLOSE, choices), (NEAR, [source for source in choices if source.same_device])):
        for source in sources_within:
            point = source.nearest(rows)
            factor = point.factor(rows)
            if factor <= bound * (1 + 1e-9):
                return FoundTiles(source, point, factor)
    return None


def change_points(choices: tuple[LayerMeasurements, ...], shape: LayerShape) -> set[int]:
    """Every T at which `find`'s answer may change."""
    found: set[int] = set()
    for source in choices:
        rows = [point.rows for point in source.points]
        bounds = [row * factor for row in rows for factor in (1 / NEAR, 1 / CLOSE, CLOSE, NEAR)]
        bounds += [math.sqrt(first * second) for first, second in itertools.combinations(rows, 2)]
        bounds += [point.held for point in source.points]
        for bound in bounds:
            tokens = math.floor(bound * shape.experts / shape.top_k)
            found |= {tokens, tokens + 1}  # on both sides of a bound that rounding may have moved
    return {tokens for tokens in found if tokens >= 1}


def _points(gate_up: Measurement, down: Measurement, shape: LayerShape) -> tuple[MeasuredTiles, ...]:
    """At each token count the block_m whose two rows take the least time together."""
    found = []
    for tokens in sorted({row.tokens for row in gate_up.rows}):
        pairs = [
            (first, second)
            for first in gate_up.rows
            for second in down.rows
            if first.tokens == second.tokens == tokens and first.block_m == second.block_m
            if math.isfinite(_time((first, second)))
        ]
        if pairs:
            first, second = min(pairs, key=_time)
            tiles = LayerTiles(first.block_m, first.tile, second.tile)
            rows = tokens * shape.top_k / shape.experts
            found.append(MeasuredTiles(tokens, rows, tiles, _time((first, second))))
    return tuple(found)


def _time(pair: tuple[TileRow, TileRow]) -> float:
    """Microseconds of a call: measured as one if it was, else the sum of its stages; infinite without them."""
    first, second = pair
    if first.layer_microseconds is not None and first.layer_microseconds == second.layer_microseconds:
        return first.layer_microseconds
    if first.microseconds is None or second.microseconds is None:
        return math.inf
    return first.microseconds + second.microseconds
