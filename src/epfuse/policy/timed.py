"""Where the time model of tiles overrules the nearest measured row.

The model sees every tile that was best somewhere on the product, for any layer, at rows per expert up to a factor of
NEAR from those where it was: it doesn't extrapolate. It overrules only where it predicts more than the fit's margin,
and never at a token count that was measured for the layer. A layer takes at most MOST_ADDED tiles besides those of its
nearest rows, because each is compiled before a server starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from epfuse.arguments import checks_enums
from epfuse.config import LayerShape
from epfuse.families.registry import family_of
from epfuse.hardware.tile_time import call_us
from epfuse.measured.fits import FitEntry
from epfuse.measured.lookup import NEAR, LayerMeasurements, MeasuredTiles, all_points
from epfuse.policy.decision import TileChoice
from epfuse.stages.tiles import LayerTiles, rows_per_expert
from epfuse.target import Target

MOST_ADDED = 3
"""Tiles that the model may add to a layer."""
LARGEST_TOKENS = 1 << 15
"""T up to which the model is asked; from here on nothing changes."""
STEP = 2 ** (1 / 6)
"""From one T at which the model is asked to the next."""


@dataclass(frozen=True)
class _Point:
    """T up to the next point, with what the nearest row says, and the layer's own row nearest to it."""

    tokens: int
    nearest: TileChoice
    measured: bool
    row: MeasuredTiles | None


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
    times = fit.times()

    def predict(tiles: LayerTiles, tokens: int) -> float:
        return call_us(times, tiles, shape, tokens)

    points = _points(ranges, measured, shape)
    seen = {choice.tiles for _, choice in ranges}
    reach = candidates(fit, target, shape)
    near = {}
    for point in points:
        near[point] = predict(point.nearest.tiles, point.tokens)
        if (row := point.row) is not None and row.tiles == point.nearest.tiles:  # believed where it was faster
            near[point] *= min(1.0, row.microseconds / predict(row.tiles, row.tokens))
    best = dict(near)
    costs: dict[LayerTiles, dict[_Point, float]] = {
        tiles: {
            point: predict(tiles, point.tokens)
            for point in points
            if low / NEAR <= rows_per_expert(point.tokens, shape) <= high * NEAR
        }
        for tiles, (low, high) in reach.items()
    }
    taken = [tiles for tiles in costs if tiles in seen]
    added: list[LayerTiles] = []
    for tiles in taken:
        _improve(best, near, costs[tiles], fit.margin)
    others = [tiles for tiles in costs if tiles not in seen]
    while others and len(added) < MOST_ADDED:
        gains = {tiles: _gain(best, near, costs[tiles], fit.margin) for tiles in others}
        chosen = max(others, key=lambda tiles: gains[tiles])
        if gains[chosen] < fit.margin:  # summed over sixths of an octave
            break
        _improve(best, near, costs[chosen], fit.margin)
        added.append(chosen)
        others.remove(chosen)
    found: list[tuple[int, TileChoice]] = []
    for point in points:
        choice = point.nearest
        if best[point] < near[point]:
            tiles = min((*taken, *added), key=lambda one: costs[one].get(point, math.inf))
            why = f"predicted {best[point] / near[point]:.2f} of the time of {point.nearest.tiles.key}"
            text = f"The time model of {fit.device}: {why}, which was: {point.nearest.source}"
            choice = TileChoice(tiles, text)
        if not found or (found[-1][1].tiles, found[-1][1].measured_us) != (choice.tiles, choice.measured_us):
            found.append((point.tokens, choice))
    return found


@checks_enums
def candidates(fit: FitEntry, target: Target, shape: LayerShape) -> dict[LayerTiles, tuple[float, float]]:
    """Tiles that the model may choose for a layer, each with the fewest and the most rows per expert where it was best.

    Args:
        fit: the product's.
        target: the product's.
        shape: the layer's sizes.
    """
    reach: dict[LayerTiles, tuple[float, float]] = {}
    for row in all_points(target, fit.device, fit.path, fit.weights):
        if _fits(row.tiles, fit, shape):
            low, high = reach.get(row.tiles, (row.rows, row.rows))
            reach[row.tiles] = min(low, row.rows), max(high, row.rows)
    return reach


def _points(
    ranges: Sequence[tuple[int, TileChoice]], measured: tuple[LayerMeasurements, ...], shape: LayerShape
) -> list[_Point]:
    """Where the model is asked: every sixth of an octave, where the nearest row changes, and the measured counts."""
    own = [source for source in measured if not source.is_foreign]
    kept = {point.tokens for source in own for point in source.points}
    steps = range(math.ceil(math.log(LARGEST_TOKENS, STEP)) + 1)
    counts = {round(STEP**step) for step in steps} | {first for first, _ in ranges}
    counts |= kept | {tokens + 1 for tokens in kept}
    found, index = [], 0
    for tokens in sorted(counts):
        while index + 1 < len(ranges) and ranges[index + 1][0] <= tokens:
            index += 1
        rows = rows_per_expert(tokens, shape)
        row = min((source.nearest(rows) for source in own), key=lambda one: one.factor(rows), default=None)
        found.append(_Point(tokens, ranges[index][1], tokens in kept, row))
    return found


def _improve(best: dict[_Point, float], near: dict[_Point, float], costs: dict[_Point, float], margin: float) -> None:
    for point, cost in costs.items():
        if not point.measured and cost < near[point] * (1 - margin):
            best[point] = min(best[point], cost)


def _gain(best: dict[_Point, float], near: dict[_Point, float], costs: dict[_Point, float], margin: float) -> float:
    """What a tile would save, in parts of a call's time, summed over the points."""
    return sum(
        1 - cost / best[point]
        for point, cost in costs.items()
        if not point.measured and cost < min(best[point], near[point] * (1 - margin))
    )


def _fits(tiles: LayerTiles, fit: FitEntry, shape: LayerShape) -> bool:
    """Whether the kernels take them for such a layer: no tile wider than a matrix, and what their family says."""
    family = family_of(fit.path, fit.weights, tiles)
    widths = ((tiles.gate_up, 2 * shape.intermediate), (tiles.down, shape.hidden))
    return all(tile.block_n <= max(64, rows) and family.fits(tile, fit.weights, tiles.block_m) for tile, rows in widths)
