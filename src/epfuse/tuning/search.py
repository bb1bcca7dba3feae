"""The search: time tiles stage by stage, then the best of them as whole calls; what is wrong can't win.

It knows neither GPUs nor clocks: a `TileBench` times and judges, a clock tells the time, and tests give it others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Protocol

from epfuse.arguments import checks_enums
from epfuse.config import Path, WeightFormat
from epfuse.errors import TuningError
from epfuse.families.family import Stage
from epfuse.measured.schema import TileRow
from epfuse.stages.tiles import GemmTile, LayerTiles, Sm90Tile
from epfuse.tuning.space import GUESSES, guessing

BEST_OF_STAGE = 3
"""Tiles of a stage that go into whole calls."""
CALLS = 5
"""Pairs of them that are timed, in the order of their sums."""
STAGE_SHARE = 0.75
"""Part of a point's time for the stages; the rest is for whole calls."""


@checks_enums
@dataclass(frozen=True)
class TuningPoint:
    """One token count of one path.

    Attributes:
        path: what runs.
        weights: the format that it reads.
        tokens: T.
    """

    path: Path
    weights: WeightFormat
    tokens: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.path.value} T={self.tokens}"


@dataclass(frozen=True)
class Timed:
    """One timing.

    Attributes:
        microseconds: median.
        fault: why the result does not count; None if it is right.
    """

    microseconds: float
    fault: str | None = None


class TileBench(Protocol):
    """Whatever times tiles and judges what they compute. A tile that can't run raises or has a fault."""

    def stage(self, point: TuningPoint, stage: Stage, block_m: int, tile: GemmTile) -> Timed:
        """One stage alone."""
        ...

    def layer(self, point: TuningPoint, tiles: LayerTiles) -> Timed:
        """A whole call."""
        ...

    def floor_us(self, point: TuningPoint, stage: Stage) -> float:
        """The least microseconds that the device's rates allow a stage."""
        ...


@dataclass(frozen=True)
class TuningPlan:
    """What is to be tried at a point.

    Attributes:
        point: where.
        before: the tiles that calls take today.
        tries: block_m -> stage -> tiles, in order.
    """

    point: TuningPoint
    before: LayerTiles
    tries: dict[int, dict[Stage, list[GemmTile]]]

    @property
    def steps(self) -> int:
        """Stage timings."""
        return sum(len(tiles) for stages in self.tries.values() for tiles in stages.values())


@dataclass
class TuningOutcome:
    """What came out of a point.

    Attributes:
        point: where.
        before_us: microseconds of a call in today's tiles.
        after_us: in the best ones; never more than before_us.
        tiles: the best ones.
        rows: for the tables, by stage.
        dropped: tile -> why it does not count.
        untried: stage timings that there was no time for.
    """

    point: TuningPoint
    before_us: float
    after_us: float
    tiles: LayerTiles
    rows: dict[Stage, list[TileRow]]
    dropped: dict[str, str] = field(default_factory=dict)
    untried: int = 0


@dataclass(frozen=True)
class _Best:
    microseconds: float
    tile: GemmTile


def search(
    plan: TuningPlan,
    bench: TileBench,
    deadline: float,
    clock: Callable[[], float],
    advance: Callable[[int], None] = lambda steps: None,
) -> TuningOutcome:
    """Find the best tiles of one point.

    Args:
        plan: what to try.
        bench: times and judges.
        deadline: when to be done, by ``clock``; today's tiles are timed whatever it says.
        clock: seconds.
        advance: told how many of the plan's steps are done or skipped.

    Raises:
        TuningError: today's tiles compute something wrong: then nothing here can be trusted.
    """
    point = plan.point
    before = bench.layer(point, plan.before)
    if before.fault is not None:
        raise TuningError(f"{point.name}: the tiles that calls take today are wrong: {before.fault}")
    begun = clock()
    stages_until = begun + STAGE_SHARE * (deadline - begun)
    outcome = TuningOutcome(
        point, before.microseconds, before.microseconds, plan.before, {stage: [] for stage in Stage}
    )
    lists = [(stage, block_m) for block_m, stages in plan.tries.items() for stage in stages]
    best: dict[tuple[Stage, int], list[_Best]] = {}
    left = plan.steps
    for where in lists:
        stage, block_m = where
        mine = len(plan.tries[block_m][stage])
        now = clock()
        until = now + (stages_until - now) * mine / max(1, left)  # of what is left a part by how much there is to try
        left -= mine
        best[where] = _stage(outcome, plan, bench, where, until, clock, advance)
    calls = {plan.before.block_m: (before.microseconds, plan.before)}
    for _, tiles in sorted(_calls(plan, best), key=lambda call: call[0]):
        if clock() >= deadline:
            break
        _keep_faster(calls, outcome, bench, tiles)
    outcome.after_us, outcome.tiles = min(calls.values(), key=lambda call: call[0])
    for _, (microseconds, tiles) in sorted(calls.items()):
        for stage, tile in ((Stage.GATE_UP, tiles.gate_up), (Stage.DOWN, tiles.down)):
            alone = {entry.tile: entry.microseconds for entry in best.get((stage, tiles.block_m), ())}
            bare = guessing(tile, 0)
            stage_us = alone[bare] if bare in alone else bench.stage(point, stage, tiles.block_m, bare).microseconds
            floor_us = bench.floor_us(point, stage)
            outcome.rows[stage].append(row_of(point.tokens, tiles.block_m, tile, stage_us, floor_us, microseconds))
    return outcome


def row_of(tokens: int, block_m: int, tile: GemmTile, stage_us: float, floor_us: float, layer_us: float) -> TileRow:
    """A row of a table, in microseconds: of the stage alone, of its floor, and of the whole call."""
    return TileRow(
        tokens=tokens,
        block_m=block_m,
        tile=tile,
        microseconds=_rounded(stage_us),
        roofline=_rounded(floor_us / stage_us),
        layer_microseconds=_rounded(layer_us),
    )


def _rounded(value: float) -> float:
    """Four significant digits: more are noise, and make no useful diff."""
    return float(f"{value:.4g}")


def _stage(
    outcome: TuningOutcome,
    plan: TuningPlan,
    bench: TileBench,
    where: tuple[Stage, int],
    until: float,
    clock: Callable[[], float],
    advance: Callable[[int], None],
) -> list[_Best]:
    """The right tiles of one stage with one block_m, fastest first; the first tile is timed whatever the clock says."""
    stage, block_m = where
    tiles = plan.tries[block_m][stage]
    found: list[_Best] = []
    for index, tile in enumerate(tiles):
        if index and clock() >= until:
            outcome.untried += len(tiles) - index
            advance(len(tiles) - index)
            break
        time = partial(bench.stage, plan.point, stage, block_m, tile)
        timed = _dropping(outcome, f"{stage.value} {block_m}/{tile.key}", time)
        if timed is not None:
            found.append(_Best(timed.microseconds, tile))
        advance(1)
    return sorted(found, key=lambda entry: entry.microseconds)


def _keep_faster(
    calls: dict[int, tuple[float, LayerTiles]], outcome: TuningOutcome, bench: TileBench, tiles: LayerTiles
) -> None:
    """Time a whole call, and keep it if it is the fastest with its block_m."""
    timed = _dropping(outcome, tiles.key, partial(bench.layer, outcome.point, tiles))
    known = calls.get(tiles.block_m)
    if timed is not None and (known is None or timed.microseconds < known[0]):
        calls[tiles.block_m] = (timed.microseconds, tiles)


def _dropping(outcome: TuningOutcome, name: str, time: Callable[[], Timed]) -> Timed | None:
    """A timing that counts; None where the tile does not run or is wrong, which is noted."""
    timed = attempt(time)
    fault = timed if isinstance(timed, str) else timed.fault
    if fault is not None:
        outcome.dropped[name] = fault
        return None
    assert isinstance(timed, Timed)
    return timed


def attempt(time: Callable[[], Timed]) -> Timed | str:
    """The timing; or what was raised, a compiler's error or the driver's, which is why a tile does not count."""
    try:
        return time()
    except Exception as error:
        return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _calls(plan: TuningPlan, best: dict[tuple[Stage, int], list[_Best]]) -> list[tuple[float, LayerTiles]]:
    """Whole calls to time, each with the sum of its stages' microseconds.

    Of every block_m the pairs with the smallest sums, and the first of them with guesses. A pair is of the best tiles
    of either stage, or one persistent tile for both.
    """
    found = []
    for block_m in plan.tries:
        up, down = best[Stage.GATE_UP, block_m], best[Stage.DOWN, block_m]
        pairs = [
            (first.microseconds + second.microseconds, LayerTiles(block_m, first.tile, second.tile))
            for first, second in product(_apart(up), _apart(down))
        ]
        pairs += [
            (first.microseconds + second.microseconds, LayerTiles(block_m, first.tile, first.tile))
            for first, second in product(up, down)
            if first.tile.for_both and first.tile == second.tile
        ]
        chosen = sorted(pairs, key=lambda pair: pair[0])[:CALLS]
        if chosen and isinstance(chosen[0][1].gate_up, Sm90Tile):
            total, tiles = chosen[0]
            chosen += [(total, replace(tiles, gate_up=guessing(tiles.gate_up, guess))) for guess in GUESSES]
        found += chosen
    return found


def _apart(entries: list[_Best]) -> list[_Best]:
    return [entry for entry in entries if not entry.tile.for_both][:BEST_OF_STAGE]


def without(plan: TuningPlan, unfit: Collection[tuple[Stage, int, GemmTile]]) -> TuningPlan:
    """The plan less the tiles whose resources are known not to do."""
    tries = {
        block_m: {
            stage: [tile for tile in tiles if (stage, block_m, tile) not in unfit] for stage, tiles in stages.items()
        }
        for block_m, stages in plan.tries.items()
    }
    return replace(plan, tries=tries)
