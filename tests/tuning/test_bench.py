"""The real bench, on the device of the tests: it times, and it finds a tile that computes something wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from epfuse import LayerShape, Path, SwiGLUOAI
from epfuse.bench.layers import Layer
from epfuse.bench.measure import Sampling
from epfuse.config import Bias, WeightFormat
from epfuse.families.family import LayerCall, Stage, Steps
from epfuse.families.portable import Portable
from epfuse.families.registry import FP8_PATHS, READABLE
from epfuse.stages.tiles import GemmTile, LayerTiles
from epfuse.target import target_of
from epfuse.tuning import bench as tuning_bench
from epfuse.tuning.bench import DeviceBench
from epfuse.tuning.search import TuningPlan, TuningPoint, search

LAYER = Layer("tiny", LayerShape(hidden=128, intermediate=128, experts=8, local_experts=4, top_k=2), SwiGLUOAI())
ONCE = Sampling(samples=1, seconds=0.0)
TILE = GemmTile(64, 32, 0, 4, 2)
FORMS = {
    Path.BF16: WeightFormat.DENSE,
    Path.W8A16: WeightFormat.MXFP8,
    Path.W8A8: WeightFormat.MXFP8,
    Path.BLOCK_FP8: WeightFormat.BLOCK_FP8,
}


def tiles_of(path: Path) -> LayerTiles:
    tile = GemmTile(64, 128, 0, 4, 2) if path in FP8_PATHS else TILE
    return LayerTiles(16, tile, tile)


@pytest.fixture
def bench(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> DeviceBench:
    if device.type == "cpu":  # the interpreter is slow: one of the calls that are timed in turn will do
        draw = tuning_bench.draw_inputs
        monkeypatch.setattr(tuning_bench, "draw_inputs", lambda *arguments: draw(*arguments)[:1])
    return DeviceBench(LAYER, device, ONCE)


@pytest.mark.parametrize("path", list(FORMS))
def test_calls_and_stages_are_timed_and_right(bench: DeviceBench, path: Path) -> None:
    target = target_of(bench.device)
    if target.is_gpu and FORMS[path] not in READABLE[target][path]:
        pytest.skip(f"{path.value} reads other weights on {target.value}")
    point, tiles = TuningPoint(path, FORMS[path], 3), tiles_of(path)
    whole = bench.layer(point, tiles)
    assert whole.fault is None
    assert whole.microseconds > 0
    for stage in Stage:
        alone = bench.stage(point, stage, 32, replace(tiles.gate_up, block_n=32))
        assert alone.fault is None
        assert alone.microseconds > 0
        assert bench.floor_us(point, stage) > 0


@pytest.mark.parametrize("path", list(FORMS))
def test_biases_are_in_calls_and_in_the_oracle(bench: DeviceBench, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    biased = DeviceBench(replace(LAYER, bias=Bias.ADDED), bench.device, ONCE)
    target = target_of(biased.device)
    if target.is_gpu and FORMS[path] not in READABLE[target][path]:
        pytest.skip(f"{path.value} reads other weights on {target.value}")
    point, tiles = TuningPoint(path, FORMS[path], 3), tiles_of(path)
    assert biased.layer(point, tiles).fault is None
    assert all(biased.stage(point, stage, 16, tiles.gate_up).fault is None for stage in Stage)
    for field in ("gate_up_bias", "down_bias"):
        calls = biased._calls_at(point)
        assert all(getattr(call, field).abs().max() > 1 for call in calls)
        with monkeypatch.context() as without:
            without.setattr(biased, "_calls", [call._replace(**{field: None}) for call in calls])
            assert biased.layer(point, tiles).fault is not None, field


def one_element_off(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Portable.steps

    def steps(self: Portable, call: LayerCall, tiles: LayerTiles) -> Steps:
        right = real(self, call, tiles)
        return right._replace(launches=(*right.launches, ("spoil", lambda: call.out[0, 0].add_(40.0))))

    monkeypatch.setattr(Portable, "steps", steps)


def test_a_stage_that_computes_something_wrong_is_found(bench: DeviceBench, monkeypatch: pytest.MonkeyPatch) -> None:
    point = TuningPoint(Path.BF16, WeightFormat.DENSE, 3)
    assert bench.layer(point, tiles_of(Path.BF16)).fault is None
    one_element_off(monkeypatch)
    fault = bench.stage(point, Stage.DOWN, 16, TILE).fault
    assert fault is not None
    assert "from the oracle" in fault


def test_a_call_that_computes_something_wrong_is_found(bench: DeviceBench, monkeypatch: pytest.MonkeyPatch) -> None:
    one_element_off(monkeypatch)
    fault = bench.layer(TuningPoint(Path.BF16, WeightFormat.DENSE, 3), tiles_of(Path.BF16)).fault
    assert fault is not None
    assert "from the oracle" in fault


def test_a_search_on_the_device(bench: DeviceBench) -> None:
    point, wider = TuningPoint(Path.BF16, WeightFormat.DENSE, 3), replace(TILE, block_n=128)
    plan = TuningPlan(point, tiles_of(Path.BF16), {16: {stage: [TILE, wider] for stage in Stage}})
    outcome = search(plan, bench, 1e9, lambda: 0.0)
    assert outcome.dropped == {}
    assert outcome.after_us <= outcome.before_us
    assert all(len(rows) == 1 for rows in outcome.rows.values())
