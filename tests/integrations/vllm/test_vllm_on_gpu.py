"""The GPU script's parts that need no GPU, with vLLM's own classes; its compiled operators are stood in for."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, replace

import pytest
import torch
import vllm.platforms
from click.testing import CliRunner
from tools.vllm_on_gpu import __main__ as script
from tools.vllm_on_gpu.checks import Cases, check_candidate, poison_workspaces, reserve_workspaces
from tools.vllm_on_gpu.kernels import Builder, ExpertsCandidate
from vllm.model_executor.layers.fused_moe.experts import marlin_moe
from vllm.model_executor.layers.quantization.utils import marlin_utils_fp8
from vllm.v1.worker import workspace

import epfuse.api
import epfuse.bench.run
from epfuse import ExpertMap, ExpertWeights, Path, fused_experts
from epfuse.bench.contender import ContenderKind
from epfuse.bench.inputs import draw_inputs
from epfuse.bench.layers import LAYERS, Layer
from epfuse.bench.measure import Measured, Timing, TimingMethod
from epfuse.bench.routing import Routing, RoutingKind
from epfuse.bench.weights import LayerWeights
from epfuse.config import Bias, LayerShape, SwiGLUOAI
from epfuse.errors import ConfigError
from epfuse.integrations.vllm import releases
from epfuse.target import REFERENCE_DEVICE, Target
from tests.integrations.vllm import compiled_ops

pytestmark = pytest.mark.skipif(releases.installed() != script.RELEASE, reason=f"for vLLM {script.RELEASE}")

CPU = torch.device("cpu")
TARGET = Target.GFX950  # its weights stay as they are
SHAPE = LayerShape(hidden=128, intermediate=64, experts=8, local_experts=4, top_k=2)
LAYER = Layer("tiny", SHAPE, SwiGLUOAI())
WITH_BIASES = Layer("tiny-biases", replace(SHAPE, local_experts=8), SwiGLUOAI(), Bias.ADDED)


@pytest.fixture
def on_cpu(monkeypatch) -> None:
    """vLLM's workspaces and epfuse's kernels on a CPU that stands for a GPU."""
    vllm.platforms._current_platform.become(Target.SM90)  # where Marlin can be built
    monkeypatch.setattr(epfuse.api, "target_of", lambda device: TARGET)
    monkeypatch.setattr(epfuse.api, "device_name", lambda device: REFERENCE_DEVICE[TARGET])
    monkeypatch.setattr(workspace, "_manager", workspace.WorkspaceManager(CPU))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)


@pytest.fixture
def weights(on_cpu) -> LayerWeights:
    return LayerWeights(LAYER, 0, CPU)


@pytest.fixture
def candidates(weights, monkeypatch) -> list[ExpertsCandidate]:
    """All five, called through vLLM's modular kernel, with PyTorch in place of compiled operators."""
    plain = ExpertWeights.bf16(*Builder(weights, TARGET, 9)._dense())
    real = inspect.signature(marlin_moe.fused_marlin_moe)

    def repack(module, w13, w2, w13_scale, w2_scale):
        assert torch.get_default_dtype() == torch.bfloat16
        local, twice, hidden = w13.shape
        first = torch.zeros(local, hidden // 16, twice * 4, dtype=torch.int32)
        second = torch.zeros(local, twice // 2 // 16, hidden * 4, dtype=torch.int32)
        return first, second, w13_scale.bfloat16(), w2_scale.bfloat16()

    def marlin(*args, **kwargs):
        given = real.bind(*args, **kwargs).arguments
        tokens, top_k = given["topk_ids"].shape
        assert given["intermediate_cache13"].numel() >= tokens * top_k * max(2 * SHAPE.intermediate, SHAPE.hidden)
        gate = SwiGLUOAI(given["gemm1_alpha"], given["gemm1_beta"], given["clamp_limit"])
        call = (given["hidden_states"], plain, given["topk_weights"], given["topk_ids"])
        result = fused_experts(*call, ExpertMap(given["expert_map"]), activation=gate, path=Path.REFERENCE)
        given["output"].copy_(result)

    monkeypatch.setattr(marlin_utils_fp8, "prepare_mxfp8_moe_layer_for_marlin", repack)
    monkeypatch.setattr(marlin_moe, "fused_marlin_moe", marlin)
    made = Builder(weights, TARGET, 9).all()
    for candidate in made:
        if "Triton" in candidate.name:
            compiled_ops.give(candidate.kernel.kernel.fused_experts, LAYER.activation, monkeypatch)
    return made


def inputs_for(tokens: int, layer: Layer = LAYER) -> list:
    return draw_inputs(layer, Routing(RoutingKind.UNIFORM), tokens, 0, CPU, 0)


def test_everyone_is_right_in_poisoned_locked_workspaces(candidates, weights):
    assert [candidate.label for candidate in candidates] == [
        "EpfuseExperts mxfp8",
        "MarlinExperts mxfp8",
        "EpfuseExperts bf16",
        "Mxfp8EmulationTritonExperts bf16",
        "TritonExperts bf16",
    ]
    reserve_workspaces(candidates, inputs_for(9)[0])
    assert workspace.current_workspace_manager().is_locked()
    cases = Cases.of(inputs_for(9), weights)
    for candidate in candidates:
        checks = check_candidate(candidate, cases)
        assert [check.failure for check in checks] == [None] * len(checks)
        assert all(check.ok for check in checks), checks
        names = [check.what for check in checks]
        assert names[:3] == ["eager", "replay", "replay, other routing"]
        assert ("replay, padding rows" in names) == (candidate.kind is ContenderKind.PATH)


def test_gpt_oss_beside_biases_and_alternating_rows(on_cpu, monkeypatch):
    """The same numbers for both, and float64 from the layer before vLLM's order of rows."""
    weights = LayerWeights(WITH_BIASES, 0, CPU)
    candidates = Builder(weights, TARGET, 9).all()
    assert [candidate.label for candidate in candidates] == ["EpfuseExperts bf16", "TritonExperts bf16"]
    compiled_ops.give_gpt_oss(candidates[1].kernel.kernel.fused_experts, monkeypatch)
    reserve_workspaces(candidates, inputs_for(9, WITH_BIASES)[0])
    for tokens in (1, 9):
        cases = Cases.of(inputs_for(tokens, WITH_BIASES), weights)
        for candidate in candidates:
            checks = check_candidate(candidate, cases)
            assert all(check.ok for check in checks), checks


def test_biases_with_another_activation_are_refused(on_cpu):
    layer = replace(WITH_BIASES, activation=SwiGLUOAI(limit=5.0))
    with pytest.raises(ConfigError, match="vLLM knows biases beside"):
        Builder(LayerWeights(layer, 0, CPU), TARGET, 9)


def test_poison_reaches_what_apply_is_given(candidates):
    candidate = candidates[0]
    inputs = inputs_for(3)[0]
    candidate.kernel.call(inputs.hidden, inputs.topk_weights, inputs.topk_ids)
    poison_workspaces()
    experts = candidate.kernel.kernel.fused_experts
    shapes = experts.workspace_shapes(3, 2 * SHAPE.intermediate, SHAPE.hidden, SHAPE.top_k, 8, 4, None, None)
    manager = workspace.current_workspace_manager()
    for memory in manager.get_simultaneous(*((shape, torch.bfloat16) for shape in shapes[:2])):
        assert memory.isnan().all()


class Broken:
    """A kernel that is wrong in a way of its choosing."""

    def __init__(self, kernel, how: str) -> None:
        self._kernel, self._how, self._first, self.w1 = kernel, how, None, kernel.w1

    def call(self, hidden, topk_weights, topk_ids):
        if self._how == "raises":
            raise RuntimeError("no kernel image")
        if self._how == "keeps its first routing":
            self._first = topk_ids.clone() if self._first is None else self._first
            topk_ids = self._first
        output = self._kernel.call(hidden, topk_weights, topk_ids)
        if self._how == "loses a row":
            output[-1] = torch.nan
        return output


@pytest.mark.parametrize(
    ("how", "failed"),
    [
        ("raises", {"call"}),
        ("loses a row", {"eager", "replay", "replay, other routing", "replay, padding rows"}),
        ("keeps its first routing", {"replay, other routing", "replay, padding rows"}),
    ],
)
def test_what_is_wrong_is_found(how, failed, candidates, weights):
    broken = replace(candidates[0], kernel=Broken(candidates[0].kernel, how))
    checks = check_candidate(broken, Cases.of(inputs_for(9), weights))
    assert {check.what for check in checks if not check.ok} == failed
    json.dumps(list(map(asdict, checks)), allow_nan=False)


@pytest.fixture
def quick_times(monkeypatch):
    """Every timing is one call of each of two inputs."""

    def time_calls(calls, device, sampling, method):
        assert method is TimingMethod.PLAIN
        return Measured(Timing.of([1e-3, 2e-3], len(calls), method), [call() for call in calls])

    monkeypatch.setattr(epfuse.bench.run, "time_calls", time_calls)
    monkeypatch.setattr(epfuse.bench.run, "draw_inputs", lambda *args: draw_inputs(*args)[:2])


def test_a_whole_run(candidates, weights, quick_times, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(LAYERS, "tiny", LAYER)
    monkeypatch.setattr(script, "ODD_TOKENS", 3)
    monkeypatch.setattr(script, "_candidates", lambda *_: (weights, candidates))
    run, file = script.RunFindings(), tmp_path / "record.json"
    script.measure(run, "tiny", (5,), CPU, float("inf"), file)
    assert run.ok
    record = json.loads(file.read_text())
    assert record["format"] == "epfuse-vllm-on-gpu-1"
    assert {check["tokens"] for check in record["checks"]} == {3, 5}
    assert [row["contender"] for row in record["bench"]["rows"]] == [candidate.name for candidate in candidates]
    script.report(run)
    shown = capsys.readouterr().out
    assert "MarlinExperts mxfp8" in shown
    assert "replay, other routing" in shown


def test_no_time_is_begun_after_the_budget_and_nothing_wrong_is_timed(
    candidates, weights, quick_times, monkeypatch, capsys
):
    wrong = replace(candidates[0], kernel=Broken(candidates[0].kernel, "loses a row"))
    monkeypatch.setitem(LAYERS, "tiny", LAYER)
    monkeypatch.setattr(script, "ODD_TOKENS", 3)
    monkeypatch.setattr(script, "_candidates", lambda *_: (weights, [wrong]))
    run = script.RunFindings()
    script.measure(run, "tiny", (3,), CPU, float("inf"), None)
    assert run.record.rows[0].time is None
    assert not run.ok
    late = script.RunFindings()
    script.measure(late, "tiny", (3,), CPU, 0.0, None)
    assert late.left_out == [3]
    assert not late.record.complete
    script.report(late)
    assert "not timed, for want of time: T=3" in capsys.readouterr().out


def test_without_a_gpu_it_is_a_usage_error():
    result = CliRunner().invoke(script.main, [])
    assert result.exit_code == 2
    assert "no GPU" in result.output


@pytest.mark.parametrize("text", ["", "1,x", "0", "16,-1"])
def test_counts_that_are_none_are_refused(text):
    result = CliRunner().invoke(script.main, ["--tokens", text])
    assert result.exit_code == 2
    assert "list of token counts" in result.output
