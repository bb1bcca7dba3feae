"""A whole run: what is planned, resumed, shared among ranks, written, and then used by calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path as FilePath

import pytest

from epfuse import Path, Target
from epfuse.config import Bias, WeightFormat
from epfuse.errors import UnsupportedTarget
from epfuse.families.family import CallKind, Stage
from epfuse.measured import store
from epfuse.policy import decide
from epfuse.stages.tiles import GemmTile, LayerTiles
from epfuse.tuning.run import Device, TuningRequest, pending, plan_of, run
from epfuse.tuning.search import Timed, TuningOutcome, TuningPlan, TuningPoint
from epfuse.tuning.space import Space
from tests.tuning.clock import Clock
from tests.tuning.tables import H100, M3, measurement, reading, row, write

DEVICE = Device(Target.GFX942, "AMD Instinct MI300X", "2.11.0", "3.7.1")
WINNER = GemmTile(32, 64, 0, 4, 2)


class Bench:
    """Ten seconds a whole call; one tile is fast."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def stage(self, point: TuningPoint, stage: Stage, block_m: int, tile: GemmTile) -> Timed:
        return Timed(1.0 if tile == WINNER else 10.0)

    def layer(self, point: TuningPoint, tiles: LayerTiles) -> Timed:
        self.clock.now += 10.0
        return Timed(5.0 if tiles.gate_up == tiles.down == WINNER else 25.0)

    def floor_us(self, point: TuningPoint, stage: Stage) -> float:
        return 0.5


class Watch:
    def __init__(self) -> None:
        self.ended: list[TuningOutcome] = []
        self.steps = 0

    def begin(self, plan: TuningPlan, index: int, points: int) -> None:
        assert index < points

    def advance(self, steps: int) -> None:
        self.steps += steps

    def end(self, outcome: TuningOutcome) -> None:
        self.ended.append(outcome)


@pytest.fixture
def request_(tmp_path: FilePath) -> TuningRequest:
    return TuningRequest(DEVICE, M3, (Path.BF16,), (1, 16, 64, 1024), tmp_path, "epfuse tune")


def go(request: TuningRequest, seconds: float = 1e9, **changes: object) -> list[TuningOutcome]:
    clock, watch = Clock(), Watch()
    plans = [plan_of(request, point) for point in pending(request)]
    outcomes = run(request, plans, Bench(clock), watch, seconds, clock)
    assert watch.ended == outcomes
    return outcomes


def test_calls_take_what_was_found(request_: TuningRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [outcome.point.tokens for outcome in go(request_)] == [1, 16, 64, 1024]
    with reading(request_.folder, monkeypatch):
        decision = decide(CallKind(Path.BF16, Target.GFX942, M3), 20)
        assert decision.tiles is not None
        assert decision.tiles.gate_up == decision.tiles.down == WINNER
        assert "measured at T=16 on AMD Instinct MI300X" in decision.tile_source
        assert decision.measured_us == 5.0


def test_a_run_that_ended_early_goes_on_where_it_stopped(request_: TuningRequest) -> None:
    first = go(request_, seconds=15.0)
    assert 0 < len(first) < 4
    rest = go(request_)
    assert [outcome.point.tokens for outcome in first + rest] == [1, 16, 64, 1024]
    assert pending(request_) == []


def test_time_goes_where_there_is_most_to_try(request_: TuningRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_second(self: Bench, *_: object) -> Timed:
        self.clock.now += 1.0
        return Timed(10.0)

    monkeypatch.setattr(Bench, "stage", one_second)
    plans = [plan_of(request_, point) for point in request_.points()]
    steps = [plan.steps for plan in plans]
    assert max(steps) > 2 * min(steps)
    tried = [step - outcome.untried for step, outcome in zip(steps, go(request_, seconds=sum(steps)), strict=True)]
    assert all(0.4 * step <= one <= 0.9 * step for step, one in zip(steps, tried, strict=True))  # the rest is for calls


def test_other_versions_and_devices_are_measured_anew(request_: TuningRequest) -> None:
    go(request_)
    for device in (replace(DEVICE, triton="3.8.0"), replace(DEVICE, name="AMD Instinct MI325X")):
        assert len(pending(replace(request_, device=device))) == 4


def test_ranks_share_the_points(request_: TuningRequest) -> None:
    parts = [pending(request_, (index, 3)) for index in (1, 2, 3)]
    together = [point for part in parts for point in part]
    assert len(together) == 4
    assert set(together) == set(request_.points())


def test_a_plan_begins_with_what_calls_take_today(request_: TuningRequest) -> None:
    plan = plan_of(request_, TuningPoint(Path.BF16, WeightFormat.DENSE, 64))
    today = decide(CallKind(Path.BF16, Target.GFX942, M3, device_name=DEVICE.name), 64).tiles
    assert plan.before == today
    assert plan.tries[plan.before.block_m][Stage.GATE_UP][0] == plan.before.gate_up
    assert all(tiles for stages in plan.tries.values() for tiles in stages.values())


def test_extra_tiles_are_tried(request_: TuningRequest) -> None:
    extra = LayerTiles(128, GemmTile(256, 32, 3, 8, 2), GemmTile(256, 32, 3, 8, 2))
    plan = plan_of(replace(request_, extra=((64, extra),)), TuningPoint(Path.BF16, WeightFormat.DENSE, 64))
    assert extra.gate_up in plan.tries[128][Stage.GATE_UP]
    assert 128 not in plan_of(request_, TuningPoint(Path.BF16, WeightFormat.DENSE, 64)).tries


def test_both_tables_are_written_with_where_they_are_from(request_: TuningRequest) -> None:
    go(request_)
    for stage in Stage:
        (measured,) = store.read_table(request_.folder, Target.GFX942, stage).measurements
        assert (measured.device, measured.triton, measured.source) == (DEVICE.name, "3.7.1", "epfuse tune")
        assert {row.tokens for row in measured.rows} == {1, 16, 64, 1024}


def test_a_layer_with_biases_goes_on_from_its_own_rows(
    request_: TuningRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    biased = replace(request_, bias=Bias.ADDED)
    go(biased)
    write(biased.folder, measurement(row(16), device=DEVICE.name), target=Target.GFX942)  # of one without
    assert pending(biased) == []
    kind = CallKind(Path.BF16, Target.GFX942, M3, bias=Bias.ADDED)
    with reading(biased.folder, monkeypatch):
        assert decide(kind, 16).measured_us == 5.0
        assert plan_of(biased, biased.points()[1]).before.down == WINNER
        assert plan_of(request_, biased.points()[1]).before.down != WINNER


def test_a_path_without_a_kernel_is_refused(request_: TuningRequest) -> None:
    with pytest.raises(UnsupportedTarget, match="'bf16' has no kernel for cpu"):
        replace(request_, device=replace(DEVICE, target=Target.CPU)).points()


def test_hopper_is_planned_with_its_own_kernels(tmp_path: FilePath) -> None:
    device = Device(Target.SM90, H100, "2.11.0", "3.6.0")
    request = TuningRequest(device, M3, (Path.W8A16, Path.BF16), (1, 256), tmp_path, "epfuse tune")
    for point in request.points():
        kinds = {type(t).__name__ for s in plan_of(request, point).tries.values() for ts in s.values() for t in ts}
        assert kinds <= {"Sm90Tile", "Sm90PersistentTile"}


def test_known_tiles_are_those_of_defaults_and_tables_of_every_layer(tmp_path: FilePath) -> None:
    device = Device(Target.SM90, H100, "2.11.0", "3.6.0")
    other = replace(M3, hidden=4096, intermediate=1536)
    request = TuningRequest(device, other, (Path.W8A16,), (2048,), tmp_path, "epfuse tune", space=Space.KNOWN)
    (point,) = request.points()
    plan = plan_of(request, point)
    tried = {tile for stages in plan.tries.values() for tiles in stages.values() for tile in tiles}
    measured = store.shipped(Target.SM90, Stage.GATE_UP).measurements
    (of_m3,) = (entry for entry in measured if (entry.device, entry.path, entry.shape) == (H100, Path.W8A16, M3))
    rows = [row.tile for row in of_m3.rows if row.tokens == 2048]
    assert rows
    assert set(rows) <= tried
    assert plan.steps < plan_of(replace(request, space=Space.FULL), point).steps / 2
