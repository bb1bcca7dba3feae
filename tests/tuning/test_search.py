"""The search with a bench and a clock of its own: what wins, what can't, what is cut, what is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from epfuse import Path
from epfuse.config import WeightFormat
from epfuse.errors import TuningError
from epfuse.families.family import Stage
from epfuse.stages.tiles import GemmTile, LayerTiles, Sm90Tile
from epfuse.tuning.search import Timed, TuningPlan, TuningPoint, search, without
from tests.tuning.clock import Clock

POINT = TuningPoint(Path.BF16, WeightFormat.DENSE, 64)
TODAY = GemmTile(64, 64, 0, 4, 2)
FAST, SLOW, WRONG, BROKEN = (replace(TODAY, block_n=n) for n in (128, 256, 32, 16))
SECOND = 1.0
"""What each timing takes by the clock of these tests."""


class FakeBench:
    """A tile's time is looked up; one is wrong, one does not run."""

    def __init__(self, clock: Clock, best_block_m: int = 16) -> None:
        self.clock = clock
        self.best_block_m = best_block_m
        self.timed: list[object] = []
        self.wrong_today = False

    def _us(self, tile: GemmTile, block_m: int) -> float:
        base = {128: 5.0, 64: 10.0, 256: 20.0, 32: 1.0, 16: 1.0}[tile.block_n]
        guess = 1.0 if isinstance(tile, Sm90Tile) and tile.guess_bytes == 512 else 0.0
        return base + (0.0 if block_m == self.best_block_m else 3.0) - guess

    def stage(self, point: TuningPoint, stage: Stage, block_m: int, tile: GemmTile) -> Timed:
        self.clock.now += SECOND
        self.timed.append((stage, block_m, tile))
        if tile.block_n == BROKEN.block_n:
            raise RuntimeError("out of shared memory\nmore")
        fault = "wrong: 3 dB" if tile.block_n == WRONG.block_n else None
        return Timed(self._us(tile, block_m), fault)

    def layer(self, point: TuningPoint, tiles: LayerTiles) -> Timed:
        self.clock.now += SECOND
        self.timed.append(tiles)
        fault = "wrong: 3 dB" if self.wrong_today else None
        return Timed(sum(self._us(tile, tiles.block_m) for tile in (tiles.gate_up, tiles.down)) + 4.0, fault)

    def floor_us(self, point: TuningPoint, stage: Stage) -> float:
        return 2.0


def plan(*tiles: GemmTile, block_ms: tuple[int, ...] = (16,), today: GemmTile = TODAY) -> TuningPlan:
    tries = {block_m: {stage: [today, *tiles] for stage in Stage} for block_m in block_ms}
    return TuningPlan(POINT, LayerTiles(block_ms[0], today, today), tries)


@pytest.fixture
def bench() -> FakeBench:
    return FakeBench(Clock())


def test_the_fastest_pair_wins(bench: FakeBench) -> None:
    outcome = search(plan(SLOW, FAST), bench, 1000.0, bench.clock)
    assert outcome.tiles == LayerTiles(16, FAST, FAST)
    assert (outcome.before_us, outcome.after_us) == (24.0, 14.0)
    (row,) = outcome.rows[Stage.DOWN]
    assert (row.tile, row.microseconds, row.layer_microseconds, row.roofline) == (FAST, 5.0, 14.0, 0.4)


def test_a_wrong_tile_can_not_win(bench: FakeBench) -> None:
    outcome = search(plan(WRONG, SLOW), bench, 1000.0, bench.clock)
    assert outcome.tiles == LayerTiles(16, TODAY, TODAY)
    assert outcome.dropped[f"gate_up 16/{WRONG.key}"] == "wrong: 3 dB"
    assert all(WRONG not in (call.gate_up, call.down) for call in bench.timed if isinstance(call, LayerTiles))


def test_a_tile_that_does_not_run_is_dropped_with_its_reason(bench: FakeBench) -> None:
    outcome = search(plan(BROKEN, FAST), bench, 1000.0, bench.clock)
    assert outcome.tiles.gate_up == FAST
    assert outcome.dropped[f"down 16/{BROKEN.key}"] == "RuntimeError: out of shared memory"


def test_nothing_is_searched_if_todays_tiles_are_wrong(bench: FakeBench) -> None:
    bench.wrong_today = True
    with pytest.raises(TuningError, match="bf16 T=64: the tiles that calls take today are wrong: wrong: 3 dB"):
        search(plan(FAST), bench, 1000.0, bench.clock)


def test_todays_tiles_stay_if_nothing_is_faster(bench: FakeBench) -> None:
    outcome = search(plan(SLOW), bench, 1000.0, bench.clock)
    assert outcome.tiles == LayerTiles(16, TODAY, TODAY)
    assert outcome.after_us == outcome.before_us
    assert [row.tile for row in outcome.rows[Stage.GATE_UP]] == [TODAY]


def test_every_block_m_has_a_row_and_the_best_one_wins() -> None:
    bench = FakeBench(Clock(), best_block_m=32)
    outcome = search(plan(FAST, block_ms=(16, 32, 64)), bench, 1000.0, bench.clock)
    assert [row.block_m for row in outcome.rows[Stage.GATE_UP]] == [16, 32, 64]
    assert outcome.tiles.block_m == 32


def test_guesses_are_tried_on_whole_calls_only(bench: FakeBench) -> None:
    tile = Sm90Tile(128, 128, 0, 4, 3)
    outcome = search(plan(tile, today=Sm90Tile(64, 128, 0, 4, 3)), bench, 1000.0, bench.clock)
    assert outcome.tiles == LayerTiles(16, replace(tile, guess_bytes=512), tile)
    assert all(not (isinstance(entry, tuple) and entry[2].guess_bytes) for entry in bench.timed)
    assert outcome.rows[Stage.GATE_UP][0].microseconds == 5.0


def test_a_search_ends_in_time_and_says_what_it_left() -> None:
    bench = FakeBench(Clock())
    steps: list[int] = []
    everything = plan(*[replace(FAST, num_stages=n) for n in range(3, 60)])
    outcome = search(everything, bench, 21.0, bench.clock, steps.append)
    assert bench.clock.now <= 21.0 + SECOND
    assert {entry[0] for entry in bench.timed if isinstance(entry, tuple)} == set(Stage)
    assert sum(steps) == everything.steps
    assert outcome.untried > 90
    assert outcome.after_us < outcome.before_us


def test_unfit_tiles_are_not_timed(bench: FakeBench) -> None:
    pruned = without(plan(FAST, SLOW), {(Stage.GATE_UP, 16, FAST)})
    search(pruned, bench, 1000.0, bench.clock)
    assert (Stage.GATE_UP, 16, FAST) not in bench.timed
    assert (Stage.DOWN, 16, FAST) in bench.timed
