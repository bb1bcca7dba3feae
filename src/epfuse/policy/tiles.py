"""Tiles by token count: measured rows where one is near, else defaults; or what the time model says is faster."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from itertools import groupby

import torch

from epfuse.config import Bias, Combine, LayerShape, SwiGLUOAI
from epfuse.families.family import CallKind
from epfuse.families.registry import default_ranges
from epfuse.measured.fits import fit_of
from epfuse.measured.lookup import FoundTiles, LayerMeasurements, change_points, find, sources
from epfuse.policy.decision import TileChoice
from epfuse.policy.timed import overruled
from epfuse.stages.tiles import LayerTiles, TileRange, has_few_tiles, rows_per_expert

log: logging.Logger = logging.getLogger(__name__)


def tile_ranges(kind: CallKind) -> list[tuple[int, TileChoice]]:
    """The first T of every range, ascending from 1, and its tiles.

    Tiles are those of `nearest_ranges` but where the time model of tiles overrules them.

    Args:
        kind: of the calls, on one path and one format.
    """
    ranges, measured = nearest_ranges(kind), _measured(kind)
    fit = fit_of(kind.target, kind.device, kind.path, kind.form) if _as_measured(kind) else None
    if fit is not None and not has_few_tiles(kind.shape):  # of those it predicts half or less
        ranges = overruled(ranges, measured, fit, kind.target, kind.shape)
    return ranges


def _as_measured(kind: CallKind) -> bool:
    in_order = kind.combine is Combine.DETERMINISTIC
    return in_order and kind.dtype == torch.bfloat16 and kind.activation is SwiGLUOAI


def _measured(kind: CallKind) -> tuple[LayerMeasurements, ...]:
    """What tables have for such calls."""
    if not _as_measured(kind):
        return ()
    return sources(kind.target, kind.device, kind.path, kind.form, kind.shape, kind.bias)


def nearest_ranges(kind: CallKind) -> list[tuple[int, TileChoice]]:
    """The first T of every range, ascending from 1, and the tiles of the nearest measured row, or the default.

    Args:
        kind: of the calls, on one path and one format.

    Tables are measured in bfloat16 with SwiGLU-OAI and routes summed in order, and serve nothing else.
    """
    shape, defaults = kind.shape, default_ranges(kind)
    measured = _measured(kind)
    starts = sorted({1, *_default_starts(defaults, shape), *change_points(measured, shape)})
    answers = [
        (start, find(measured, rows_per_expert(start, shape)), _default(defaults, start, shape)) for start in starts
    ]
    ranges: list[tuple[int, TileChoice]] = []
    alike = [list(group) for _, group in groupby(answers, key=lambda answer: _what(answer[1], answer[2]))]
    for group, after in zip(alike, [*alike[1:], None], strict=True):
        start, found, tiles = group[0]
        last = None if after is None else after[0][0] - 1
        ranges.append((start, _choice(found, tiles, start, last, kind, measured)))
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
    kind: CallKind,
    measured: tuple[LayerMeasurements, ...],
) -> TileChoice:
    if found is None:
        return TileChoice(tiles, f"The default of {kind.target.value}: {_why_default(measured)}.")
    source, point = found.source, found.point
    ends = [first] if last is None else [first, last]
    factor = max(point.factor(rows_per_expert(tokens, kind.shape)) for tokens in ends)
    where = f"measured at T={point.tokens} on {source.device}, {source.date}"
    if not source.same_shape:
        where += f", for E={source.shape.experts} L={source.shape.local_experts} K={source.shape.top_k}"
    if not source.same_bias:
        where += ", without biases" if source.bias is Bias.NONE else ", with biases"
    text = f"A {'tuned' if source.is_own else 'foreign'} row, {where}; calls are within a factor of {factor:.2f}."
    return TileChoice(point.tiles, text, point.microseconds if source.is_own else None)


def _why_default(measured: tuple[LayerMeasurements, ...]) -> str:
    if not measured:
        return "nothing was measured for this H and I"
    counts = ", ".join(str(point.tokens) for point in measured[0].points)
    return f"no measured row is near (T={counts} on {measured[0].device})"


def log_sources(kind: CallKind, ranges: Iterable[tuple[int, str]]) -> None:
    """Say where the tiles of calls that run are from, once in a process: foreign rows as a warning, all as information.

    Args:
        kind: of the calls, on one path and one format.
        ranges: the first T of every range, and where its tiles are from.
    """
    measured = _measured(kind)
    if not measured:
        return
    what = f"{kind.path.value} ({kind.form.value}) on {kind.device} ({kind.target.value}), {kind.shape}"
    if all(source.is_foreign for source in measured):
        _say_once(logging.WARNING, f"tiles of {what} are from foreign rows; measure them with 'epfuse tune'")
    for first, source in ranges:
        _say_once(logging.INFO, f"tiles of {what} from T={first}: {source}")


_said: set[str] = set()


def _say_once(level: int, text: str) -> None:
    if log.isEnabledFor(level) and text not in _said:
        _said.add(text)
        log.log(level, "%s", text)
