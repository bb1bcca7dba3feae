"""Where the time model of tiles overrules the nearest measured row.

The model sees every tile that was best somewhere on the product, for any layer, at rows per expert within a factor of
CLOSE of those where it was: it doesn't extrapolate. The smallest blocks are multiplied whole whatever rows they have,
so a tile of them reaches as far as any of them was best. It compares tiles of one kind of kernel: what it gets wrong of
a layer, it gets wrong of all of them alike. It overrules only where it predicts to save more than the fit's error, and
never at a token count that was measured for the layer. A layer takes at most MOST_ADDED tiles besides those of its
nearest rows, because each is compiled before a server starts.

What a launch takes whose programs mostly have no tile it does not know: no layer with rows has more than 16 times as
many experts as a rank holds. There every tile has a program of its own, but with very few rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from epfuse.arguments import checks_enums
from epfuse.config import LayerShape
from epfuse.families.registry import family_of
from epfuse.families.sm90 import SPLIT_ROWS
from epfuse.hardware.tile_time import TileTimes, call_us
from epfuse.measured.fits import FitEntry
from epfuse.measured.lookup import CLOSE, LayerMeasurements, MeasuredTiles, all_points
from epfuse.policy.decision import TileChoice
from epfuse.stages.tiles import LayerTiles, Sm90Tile, is_mostly_remote, rows_per_expert
from epfuse.target import Target

MOST_ADDED = 3
"""Tiles that the model may add to a layer."""
LARGEST_TOKENS = 1 << 15
"""T up to which the model is asked; from here on nothing changes."""
STEP = 2 ** (1 / 6)
"""From one T at which the model is asked to the next."""


@dataclass(frozen=True)
class _Point:
    """T up to the next point's, what the nearest row says, and whether it was measured at this very T."""

    tokens: int
    nearest: TileChoice
    is_measured: bool


@checks_enums
def overruled(
    ranges: Sequence[tuple[int, TileChoice]],
    measured: tuple[LayerMeasurements, ...],
    fit: FitEntry,
    target: Target,
    shape: LayerShape,
) -> list[tuple[int, TileChoice]]:
    """``ranges`` with the model's choice where it overrules.

    Args:
        ranges: first T and tiles of each range, ascending from 1, of the nearest rows and defaults.
        measured: rows for layers of this H and I.
        fit: the product's.
        target: the product's.
        shape: the layer's sizes.
    """
    same = [source for source in measured if not source.is_foreign]
    near_kin = [source for source in same if source.is_own] or same  # biases change a time little
    own = tuple(row for source in near_kin for row in source.points)
    points, beside = _points(ranges, own), _Beside(fit.times(), shape, own)
    margin = fit.error if own else fit.error_other_shape
    near = {point: beside.nearest(point) for point in points}
    costs = {
        tiles: {
            point: cost
            for point in points
            if not point.is_measured
            and point.nearest.tiles.packed == tiles.packed
            and low / CLOSE <= rows_per_expert(point.tokens, shape) <= high * CLOSE
            and not _has_idle_shares(tiles, shape, point.tokens)
            and (cost := beside.other(tiles, point)) < near[point] * (1 - margin)
        }
        for tiles, (low, high) in candidates(fit, target, shape).items()
    }
    best: dict[_Point, LayerTiles] = {}
    took = dict(near)

    def take(tiles: LayerTiles) -> None:
        for point, cost in costs.pop(tiles).items():
            if cost < took[point]:
                best[point], took[point] = tiles, cost

    for tiles in {choice.tiles for _, choice in ranges} & costs.keys():  # compiled anyway
        take(tiles)
    for _ in range(MOST_ADDED):
        saved = {
            tiles: sum(max(0.0, 1 - cost / took[point]) for point, cost in costs[tiles].items()) for tiles in costs
        }
        most = max(saved, key=lambda tiles: saved[tiles], default=None)
        if most is None or saved[most] < margin:  # in parts of a call's time, over sixths of an octave
            break
        take(most)
    return _joined(points, best, {point: took[point] / near[point] for point in points}, fit.device, margin)


@dataclass(frozen=True)
class _Beside:
    """What tiles take, predicted, in microseconds.

    The layer's own rows keep the model from overruling by mistake: where the nearest row's tile was faster than the
    model says, it is believed; and where tiles of a kind were slower, other tiles of that kind are too.
    """

    times: TileTimes
    shape: LayerShape
    own: tuple[MeasuredTiles, ...]

    def nearest(self, point: _Point) -> float:
        """The tiles of the nearest row."""
        tiles = point.nearest.tiles
        rows = [row for row in self.own if row.tiles == tiles]
        return self._predict(tiles, point.tokens) * min(1.0, self._ratio(rows, point))

    def other(self, tiles: LayerTiles, point: _Point) -> float:
        """Other tiles."""
        rows = [row for row in self.own if row.tiles.packed == tiles.packed]
        return self._predict(tiles, point.tokens) * max(1.0, self._ratio(rows, point))

    def _predict(self, tiles: LayerTiles, tokens: int) -> float:
        return call_us(self.times, tiles, self.shape, tokens)

    def _ratio(self, rows: Sequence[MeasuredTiles], point: _Point) -> float:
        """Measured over predicted, of the row that is nearest."""
        expected = rows_per_expert(point.tokens, self.shape)
        row = min(rows, key=lambda one: one.factor(expected), default=None)
        return 1.0 if row is None else row.microseconds / self._predict(row.tiles, row.tokens)


def _joined(
    points: Sequence[_Point], best: dict[_Point, LayerTiles], parts: dict[_Point, float], device: str, error: float
) -> list[tuple[int, TileChoice]]:
    """Ranges: points with one choice are one."""
    found: list[tuple[int, TileChoice]] = []
    last: object = None
    for point in points:
        tiles, choice = best.get(point), point.nearest
        kind = choice if tiles is None else tiles
        if tiles is not None:
            text = f"Predicted to take {parts[point]:.2f} of the time of the {choice.tiles.block_m}-row blocks of the"
            text += f" nearest row or default at T={point.tokens}, by the time model of {device} (error {error:.1%})."
            choice = TileChoice(tiles, text)
        if kind != last:
            found.append((point.tokens, choice))
        last = kind
    return found


@checks_enums
def candidates(fit: FitEntry, target: Target, shape: LayerShape) -> dict[LayerTiles, tuple[float, float]]:
    """Tiles that the model may choose for a layer, each with the fewest and the most rows per expert where it was best.

    Args:
        fit: the product's.
        target: the product's.
        shape: the layer's sizes.
    """
    best = [row for row in all_points(target, fit.device, fit.path, fit.weights) if _fits(row.tiles, fit, shape)]
    least = min((row.tiles.block_m for row in best), default=0)

    def alike(tiles: LayerTiles) -> LayerTiles | None:
        return tiles if tiles.block_m > least else None

    rows: dict[LayerTiles | None, list[float]] = {}
    for row in best:
        rows.setdefault(alike(row.tiles), []).append(row.rows)
    return {row.tiles: (min(rows[alike(row.tiles)]), max(rows[alike(row.tiles)])) for row in best}


def _points(ranges: Sequence[tuple[int, TileChoice]], own: Sequence[MeasuredTiles]) -> list[_Point]:
    """Where the model is asked: every sixth of an octave, where the nearest row changes, and the measured counts."""
    measured = {row.tokens for row in own}
    steps = math.ceil(math.log(LARGEST_TOKENS, STEP))
    counts = {round(STEP**step) for step in range(steps + 1)} | {first for first, _ in ranges}
    counts |= {tokens + after for tokens in measured for after in (0, 1)}
    found, left = [], list(reversed(ranges))
    nearest = left.pop()[1]
    for tokens in sorted(counts):
        while left and left[-1][0] <= tokens:
            nearest = left.pop()[1]
        found.append(_Point(tokens, nearest, tokens in measured))
    return found


def _has_idle_shares(tiles: LayerTiles, shape: LayerShape, tokens: int) -> bool:
    """Whether programs would share each tile's reduction where nearly all of them have none, which the model knows not.

    With very few rows there are few programs in all.
    """
    shares = any(isinstance(tile, Sm90Tile) and tile.split_k > 1 for tile in (tiles.gate_up, tiles.down))
    return shares and is_mostly_remote(shape) and rows_per_expert(tokens, shape) > CLOSE * SPLIT_ROWS


def _fits(tiles: LayerTiles, fit: FitEntry, shape: LayerShape) -> bool:
    """Whether the kernels take them for such a layer: no tile wider than a matrix, and what their family says."""
    family = family_of(fit.path, fit.weights, tiles)
    widths = ((tiles.gate_up, 2 * shape.intermediate), (tiles.down, shape.hidden))
    return all(tile.block_n <= max(64, rows) and family.fits(tile, fit.weights, tiles.block_m) for tile, rows in widths)
