"""Named tiles: what a file may say, and that only what is right counts."""

from __future__ import annotations

import json
from pathlib import Path as FilePath
from typing import Any

import pytest

from epfuse import Path, Target
from epfuse.config import WeightFormat
from epfuse.errors import ConfigError, UnsupportedTarget
from epfuse.families.family import Stage
from epfuse.measured import store
from epfuse.stages.tiles import GemmTile, LayerTiles
from epfuse.tuning.run import Device, TuningRequest
from epfuse.tuning.search import Timed, TuningPoint
from epfuse.tuning.trials import TrialResult, fastest, keep_fastest, plans_of, read_trials, run_trials
from tests.tuning.tables import M3

SHIPPED = FilePath(__file__).parents[2] / "benchmarks" / "trials" / "minimax-m3-ep8-h100.json"


def tile(block_n: int = 64, **changes: object) -> dict[str, Any]:
    return {
        "kind": "portable", "block_n": block_n, "block_k": 128, "group_m": 0, "num_warps": 4, "num_stages": 2,
    } | changes  # fmt: skip


def trial(**changes: object) -> dict[str, Any]:
    return {"path": "bf16", "tokens": 64, "block_m": 16, "gate_up": tile(), "down": tile(128)} | changes


def write(folder: FilePath, *trials: object) -> FilePath:
    file = folder / "trials.json"
    file.write_text(json.dumps(trials))
    return file


class Bench:
    """Small tiles are fast, 32 wide they are wrong as calls and 256 wide as stages; 16 wide they don't run."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def layer(self, point: TuningPoint, tiles: LayerTiles) -> Timed:
        self.calls.append(f"{point.name} {tiles.key}")
        if tiles.gate_up.block_n == 16:
            raise RuntimeError("out of resource: shared memory\nand more")
        return Timed(float(tiles.gate_up.block_n), "wrong: a call" if tiles.gate_up.block_n == 32 else None)

    def stage(self, point: TuningPoint, stage: Stage, block_m: int, tile: GemmTile) -> Timed:
        self.calls.append(f"{stage.value} {tile.key}")
        return Timed(1.0, "wrong: a stage" if tile.block_n == 256 else None)

    def floor_us(self, point: TuningPoint, stage: Stage) -> float:
        return 0.25


def results_of(folder: FilePath, *trials: object) -> list[TrialResult]:
    return run_trials(read_trials(write(folder, *trials)), Target.GFX942, Bench())


def test_a_right_trial_has_three_times(tmp_path: FilePath) -> None:
    (result,) = results_of(tmp_path, trial())
    assert (result.layer_us, result.stage_us, result.fault) == (64.0, {Stage.GATE_UP: 1.0, Stage.DOWN: 1.0}, None)
    assert result.weights is WeightFormat.DENSE
    values = json.loads(json.dumps(result.to_json()))
    assert (values["layer_us"], values["gate_up_us"], values["down_us"]) == (64.0, 1.0, 1.0)
    assert values["gate_up_floor_us"] == 0.25
    assert values["tiles"] == "16/64x128.g0.4w.2s/128x128.g0.4w.2s"


def test_a_wrong_call_has_no_stages(tmp_path: FilePath) -> None:
    (result,) = results_of(tmp_path, trial(gate_up=tile(32)))
    assert (result.stage_us, result.fault) == ({}, "wrong: a call")


def test_a_wrong_stage_is_a_fault(tmp_path: FilePath) -> None:
    (result,) = results_of(tmp_path, trial(down=tile(256)))
    assert result.fault == "wrong: a stage"


def test_a_tile_that_does_not_run_is_a_fault_and_the_next_is_timed(tmp_path: FilePath) -> None:
    first, second = results_of(tmp_path, trial(gate_up=tile(16)), trial())
    assert first.layer_us is None
    assert first.fault == "RuntimeError: out of resource: shared memory"
    assert second.fault is None


def test_the_fastest_right_ones_are_kept(tmp_path: FilePath) -> None:
    device = Device(Target.GFX942, "AMD Instinct MI300X", "2.13.0", "3.7.1")
    request = TuningRequest(device, M3, (), (), tmp_path / "tables", "epfuse tune --trials trials.json --keep")
    trials = [trial(), trial(gate_up=tile(128)), trial(gate_up=tile(32)), trial(tokens=1, down=tile(256))]
    results = results_of(tmp_path, *trials)
    assert [result.trial.gate_up.block_n for result in fastest(results)] == [64]
    assert keep_fastest(request, results) == 1
    (measurement,) = store.read_table(tmp_path / "tables", Target.GFX942, Stage.DOWN).measurements
    assert (measurement.path, measurement.device, measurement.source) == (Path.BF16, device.name, request.source)
    (row,) = measurement.rows
    assert (row.tokens, row.block_m, row.tile.block_n) == (64, 16, 128)
    assert (row.microseconds, row.roofline, row.layer_microseconds) == (1.0, 0.25, 64.0)


def test_trials_of_a_point_run_one_after_another(tmp_path: FilePath) -> None:
    bench = Bench()
    told: list[TrialResult] = []
    file = write(tmp_path, trial(tokens=1), trial(tokens=64), trial(tokens=1, gate_up=tile(128)))
    results = run_trials(read_trials(file), Target.GFX942, bench, told.append)
    assert [result.trial.tokens for result in results] == [1, 1, 64]
    assert told == results


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ([], "lists no trial"),
        ([trial(path="w4a4")], "0.path"),
        ([trial(tokens=0)], "0.tokens"),
        ([trial(), trial(down=tile(64, kind="huge"))], "1.down"),
        ([trial(surprise=1)], "0.surprise"),
        ([trial(), trial(block_m=24)], "1: block_m is 24; it must be a power of two, none below 16"),
        ([trial(gate_up=tile(48))], "0: gate_up.block_n is 48"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: FilePath, trials: list[object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_trials(write(tmp_path, *trials))


def test_what_is_no_json_and_what_is_too_long_are_refused(tmp_path: FilePath) -> None:
    file = tmp_path / "trials.json"
    file.write_text("[{")
    with pytest.raises(ConfigError, match="Invalid JSON"):
        read_trials(file)
    file.write_bytes(b" " * (1 << 20) + b"[]")
    with pytest.raises(ConfigError, match="more than 1048576 bytes"):
        read_trials(file)


def test_the_shipped_trials_are_tiles_that_kernels_take() -> None:
    trials = read_trials(SHIPPED)
    plans = plans_of(trials, Target.SM90)
    assert {plan.point.weights for plan in plans} == {WeightFormat.FRAGMENT, WeightFormat.DENSE}
    assert {trial.path for trial in trials} == {Path.W8A16, Path.BF16}


def test_a_target_without_the_kernel_is_named() -> None:
    with pytest.raises(UnsupportedTarget, match="'bf16' has no kernel for cpu"):
        plans_of([t for t in read_trials(SHIPPED) if t.path is Path.BF16], Target.CPU)
