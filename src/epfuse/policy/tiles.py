"""Tiles by token count: measured rows where one is near, else defaults; or what the time model says is faster."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import torch

from epfuse.arguments import checks_enums
from epfuse.config import Activation, Bias, LayerShape, Path, SwiGLUOAI, WeightFormat
from epfuse.families.registry import default_ranges
from epfuse.measured.fits import fit_of
from epfuse.measured.lookup import FoundTiles, LayerMeasurements, change_points, find, sources
from epfuse.policy.decision import TileChoice
from epfuse.policy.timed import overruled
from epfuse.stages.tiles import LayerTiles, TileRange, rows_per_expert
from epfuse.target import Target

log: logging.Logger = logging.getLogger(__name__)


@contextmanager
def unlogged() -> Iterator[None]:
    """Log nothing of where tiles are from: for a command whose answer that is, or that nobody asks to tune."""
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@checks_enums
def tile_ranges(
    target: Target,
    device_name: str,
    path: Path,
    weights: WeightFormat,
    shape: LayerShape,
    dtype: torch.dtype,
    activation: type[Activation] = SwiGLUOAI,
    bias: Bias = Bias.NONE,
) -> list[tuple[int, TileChoice]]:
    """The first T of every range, ascending from 1, and its tiles. What is not as measured is logged.

    Arguments as of `nearest_ranges`, whose tiles these are but where the time model of tiles overrules them.
    """
    asked = (target, device_name, path, weights, shape)
    ranges = nearest_ranges(*asked, dtype, activation, bias)
    as_measured = dtype == torch.bfloat16 and activation is SwiGLUOAI
    measured = sources(*asked) if as_measured else ()
    fit = fit_of(target, device_name, path, weights) if as_measured else None
    if fit is not None:
        ranges = overruled(ranges, measured, fit, target, shape)
    _log(target, device_name, path, weights, shape, measured, ranges)
    return ranges


@checks_enums
def nearest_ranges(
    target: Target,
    device_name: str,
    path: Path,
    weights: WeightFormat,
    shape: LayerShape,
    dtype: torch.dtype,
    activation: type[Activation] = SwiGLUOAI,
    bias: Bias = Bias.NONE,
) -> list[tuple[int, TileChoice]]:
    """The first T of every range, ascending from 1, and the tiles of the nearest measured row, or the default.

    Args:
        target: a GPU.
        device_name: the product.
        path: neither AUTO nor REFERENCE.
        weights: the format that the kernels read.
        shape: the layer's sizes.
        dtype: of the activations.
        activation: between the two GEMMs.
        bias: whether the projections have one.

    Tables are measured in bfloat16 with SwiGLU-OAI, and serve nothing else. They are measured without biases: those are
    added after the products and move no more memory to speak of, so the tiles serve layers that have them, as foreign.
    """
    defaults = default_ranges(target, path, weights, shape, dtype, activation, bias)
    as_measured = dtype == torch.bfloat16 and activation is SwiGLUOAI
    measured = sources(target, device_name, path, weights, shape) if as_measured else ()
    starts = sorted({1, *_default_starts(defaults, shape), *change_points(measured, shape)})
    answers = [
        (start, find(measured, rows_per_expert(start, shape)), _default(defaults, start, shape)) for start in starts
    ]
    ranges: list[tuple[int, TileChoice]] = []
    alike = [list(group) for _, group in groupby(answers, key=lambda answer: _what(answer[1], answer[2]))]
    for group, after in zip(alike, [*alike[1:], None], strict=True):
        start, found, tiles = group[0]
        last = None if after is None else after[0][0] - 1
        ranges.append((start, _choice(found, tiles, start, last, target, shape, bias, measured)))
    return ranges


def _default_starts(defaults: tuple[TileRange, ...], shape: LayerShape) -> list[int]:
    """Where ranges of rows per expert begin, as T."""
    bounds = [entry.max_rows for entry in defaults if not math.isinf(entry.max_rows)]
    return [math.floor(bound * shape.experts / shape.top_k) + 1 for bound in bounds]


def _default(defaults: tuple[TileRange, ...], tokens: int, shape: LayerShape) -> LayerTiles:
    rows = rows_per_expert(tokens, shape)
    return next(entry.tiles for entry in defaults if rows <= entry.max_rows)


def _what(found: FoundTiles | None, tiles: LayerTiles) -> object:
    """What makes two token counts one range."""
    return tiles if found is None else (found.source, found.point)


def _choice(
    found: FoundTiles | None,
    tiles: LayerTiles,
    first: int,
    last: int | None,
    target: Target,
    shape: LayerShape,
    bias: Bias,
    measured: tuple[LayerMeasurements, ...],
) -> TileChoice:
    if found is None:
        return TileChoice(tiles, f"The default of {target.value}: {_why_default(measured)}.")
    source, point = found.source, found.point
    ends = [first] if last is None else [first, last]
    factor = max(point.factor(rows_per_expert(tokens, shape)) for tokens in ends)
    where = f"measured at T={point.tokens} on {source.device}, {source.date}"
    if not source.same_shape:
        where += f", for E={source.shape.experts} L={source.shape.local_experts} K={source.shape.top_k}"
    if bias is not Bias.NONE:
        where += ", without biases"
    foreign = source.is_foreign or bias is not Bias.NONE
    text = f"A {'foreign' if foreign else 'tuned'} row, {where}; calls are within a factor of {factor:.2f}."
    return TileChoice(point.tiles, text, None if foreign else point.microseconds)


def _why_default(measured: tuple[LayerMeasurements, ...]) -> str:
    if not measured:
        return "nothing was measured for this H and I"
    counts = ", ".join(str(point.tokens) for point in measured[0].points)
    return f"no measured row is near (T={counts} on {measured[0].device})"


def _log(
    target: Target,
    device_name: str,
    path: Path,
    weights: WeightFormat,
    shape: LayerShape,
    measured: tuple[LayerMeasurements, ...],
    ranges: list[tuple[int, TileChoice]],
) -> None:
    """Once for each layer: foreign rows as a warning, far ones as information."""
    if not measured:
        return
    what = f"{path.value} ({weights.value}) on {device_name} ({target.value}), {shape}"
    if all(source.is_foreign for source in measured):
        log.warning("tiles of %s are from foreign rows; measure them with 'epfuse tune'", what)
    for first, choice in ranges:
        log.info("tiles of %s from T=%d: %s", what, first, choice.source)
