"""The GPU script's parts that need no GPU, with SGLang's own layer."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from click.testing import CliRunner
from tools.sglang_on_gpu import __main__ as script
from tools.sglang_on_gpu import layers, stand_ins

import epfuse.bench.roofs
import epfuse.bench.run
from epfuse.bench.inputs import draw_inputs
from epfuse.bench.layers import LAYERS, Layer
from epfuse.bench.measure import Measured, Timing, TimingMethod
from epfuse.bench.roofline import MatrixOperand, Roof, Roofs
from epfuse.config import LayerShape, SwiGLUOAI, WeightFormat
from epfuse.integrations.sglang.rules import NAME
from tests.integrations.sglang.deployment import installed

CPU = torch.device("cpu")
SHAPE = LayerShape(hidden=128, intermediate=64, experts=8, local_experts=4, top_k=2)


@pytest.fixture
def whole_run(monkeypatch):
    """The script on a tiny layer, of which two runners exist on a CPU; every timing is one call of each input."""

    def time_calls(calls, device, sampling, method):
        assert method is TimingMethod.PLAIN
        return Measured(Timing.of([1e-3, 2e-3], len(calls), method), [call() for call in calls])

    def ours(weights):
        forms = (WeightFormat.MXFP8, WeightFormat.DENSE)
        return [layers.contender(weights, NAME, form) for form in forms]

    roofs = Roofs(Roof(1e11, "given", 0.0), {operand: Roof(1e12, "given", 0.0) for operand in MatrixOperand})
    monkeypatch.setattr(epfuse.bench.roofs, "measure_roofs", lambda device, sampling: roofs)
    monkeypatch.setattr(epfuse.bench.run, "time_calls", time_calls)
    monkeypatch.setattr(epfuse.bench.run, "draw_inputs", lambda *args: draw_inputs(*args)[:2])
    monkeypatch.setattr(layers, "contenders", ours)
    monkeypatch.setattr(layers, "install_plugin", lambda: None)
    monkeypatch.setattr(stand_ins, "install", lambda: ("sgl_kernel",))
    monkeypatch.setattr("sglang.srt.layers.moe.token_dispatcher.standard.get_device", lambda: "cpu")
    monkeypatch.setattr(script, "LAYER", "tiny")
    monkeypatch.setitem(LAYERS, "tiny", Layer("tiny", SHAPE, SwiGLUOAI()))
    with installed():
        yield


def test_a_whole_run(whole_run, tmp_path, capsys):
    file = tmp_path / "record.json"
    record = script.measure((1, 5), CPU, float("inf"), file)
    assert record.ok
    assert record.complete
    found = json.loads(file.read_text())
    assert [(row["contender"], row["weights"]) for row in found["rows"]] == [
        ("EpfuseRunnerCore", "mxfp8"),
        ("EpfuseRunnerCore", "bf16"),
    ] * 2
    assert all(row["time"] for row in found["rows"])
    assert found["run"]["stood in for"] == ["sgl_kernel"]
    script.report(record)
    assert "EpfuseRunnerCore" in capsys.readouterr().out


def test_a_wrong_result_gets_no_time(whole_run, monkeypatch):
    build = layers.build

    def other_weights(weights, runner, form):
        made = build(weights, runner, form)
        for parameter in made.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.data.zero_()
        return made

    monkeypatch.setattr(layers, "build", other_weights)
    record = script.measure((3,), CPU, float("inf"), None)
    assert not record.ok
    assert [row.time is None for row in record.rows] == [False, True]


def test_nothing_is_begun_after_the_budget(whole_run):
    record = script.measure((3,), CPU, 0.0, None)
    assert not record.rows
    assert not record.complete


def test_without_a_gpu_it_is_a_usage_error():
    result = CliRunner().invoke(script.main, [])
    assert result.exit_code == 2
    assert "no GPU" in result.output


def test_what_is_not_there_can_be_imported_and_not_called(monkeypatch):
    monkeypatch.setattr(stand_ins, "PACKAGES", ("json", "no_such_kernels"))
    monkeypatch.setattr(stand_ins, "TWINS", {"no_such_kernels.twin": ("operator", "add")})
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    assert stand_ins.install() == ("no_such_kernels",)
    try:
        package = importlib.import_module("no_such_kernels.ops.types")
        assert package.scalars.uint4 is not None
        with pytest.raises(NotImplementedError, match=r"no_such_kernels\.ops\.types\.multiply is called"):
            package.multiply(1)
        assert importlib.import_module("no_such_kernels").twin(1, 2) == 3
    finally:
        for name in [name for name in sys.modules if name.startswith("no_such_kernels")]:
            del sys.modules[name]


@pytest.mark.parametrize(("module", "name"), stand_ins.TWINS.values())
def test_the_twins_are_sglangs(module, name):
    """Their parameters begin as those of what they stand in for."""
    assert callable(getattr(importlib.import_module(module), name))
