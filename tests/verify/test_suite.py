"""The suite passes what is right and fails every kind of bug that it is there for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from epfuse import ExpertMap, ExpertWeights, Path, SwiGLUOAI, Target, api, policy
from epfuse.config import Bias, Combine, WeightFormat
from epfuse.errors import ConfigError, UnsupportedTarget
from epfuse.policy import READABLE
from epfuse.stages.route import reference as route_reference
from epfuse.target import planning_for
from epfuse.verify import problem as problem_module
from epfuse.verify import subject as subject_module
from epfuse.verify import suite
from epfuse.verify.budget import fp8_tolerance
from epfuse.verify.experts import in_format, rank_mxfp8, rank_weights
from epfuse.verify.oracle import add_experts
from epfuse.verify.problem import Problem
from epfuse.verify.record import ORACLE
from epfuse.verify.scenarios import KINDS, make_scenarios
from epfuse.verify.subject import Stored, Subject, subjects_of
from epfuse.weights.formats import PREPARED_FOR
from epfuse.weights.projections import expert_matrix
from tests.cases import snr_db

PROBLEM = Problem(
    hidden=40,
    intermediate=24,
    experts=6,
    top_k=3,
    ep_size=2,
    tokens=(1, 29),
    dtype=torch.bfloat16,
    device=torch.device("cpu"),
    seed=0,
)

REFERENCE = (Subject(Path.REFERENCE, Stored.DENSE, WeightFormat.DENSE),)
PACKED = (Subject(Path.REFERENCE, Stored.MXFP8, WeightFormat.MXFP8),)

Call = dict[str, Any]


def failed(record: suite.VerifyRecord, path: str = "reference") -> set[str]:
    return {case.name for case in record.cases if case.path == path and not case.ok}


@pytest.mark.parametrize("bias", Bias)
@pytest.mark.parametrize("activation", problem_module.ACTIVATIONS)
def test_every_kind_passes_and_a_lost_bias_does_not(
    bias: Bias, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = replace(PROBLEM, activation=problem_module.ACTIVATIONS[activation], bias=bias, tokens=(29,))
    subjects = (*REFERENCE, Subject(Path.BF16, Stored.DENSE, WeightFormat.DENSE))
    record = suite.run(problem, subjects)
    assert record.ok, [case for case in record.cases if not case.ok]
    assert record.to_json()["problem"]["bias"] == bias.value
    if bias is Bias.NONE:
        return
    right = api.run_reference

    def without(hidden: torch.Tensor, weights: ExpertWeights, *rest: Any, **options: Any) -> torch.Tensor:
        return right(hidden, ExpertWeights(weights.formats, weights.gate_up_bias), *rest, **options)

    monkeypatch.setattr(api, "run_reference", without)
    assert "uniform" in failed(suite.run(problem, REFERENCE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_reference_path_passes(dtype: torch.dtype, seed: int) -> None:
    steps: list[None] = []
    problem = replace(PROBLEM, dtype=dtype, seed=seed)
    record = suite.run(problem, REFERENCE, lambda: steps.append(None))
    assert record.ok, [case for case in record.cases if not case.ok]
    assert len(record.cases) == 2 * 2 * len(KINDS)
    assert len(steps) == suite.steps_of(problem, REFERENCE)


def drop_one_route(call: Call) -> Call:
    ids = call["topk_ids"].clone()
    ids[-1, 0] = -1
    return call | {"topk_ids": ids}


def use_a_wrong_expert(call: Call) -> Call:
    weights = call["weights"]
    dense = weights.dense_experts
    return call | {"weights": ExpertWeights.dense(dense.w13, dense.w2.roll(1, dims=0).contiguous())}


def take_the_map_of_another_rank(call: Call) -> Call:
    slots = call["expert_map"].on(torch.device("cpu"))
    return call | {"expert_map": ExpertMap(slots.roll(1))}


def ignore_the_clamp(call: Call) -> Call:
    return call | {"activation": SwiGLUOAI(limit=1e4)}


def swap_router_weights(call: Call) -> Call:
    return call | {"topk_weights": call["topk_weights"].flip(1).contiguous()}


def wrap_wide_ids(call: Call) -> Call:
    return call | {"topk_ids": call["topk_ids"].int()}


@pytest.mark.parametrize(
    ("break_call", "noticed_by"),
    [
        (drop_one_route, {"uniform", "skewed", "duplicates"}),
        (use_a_wrong_expert, {"uniform", "one expert", "one rank", "clamped"}),
        (take_the_map_of_another_rank, {"uniform", "one rank"}),
        (ignore_the_clamp, {"clamped", "outlier channel"}),
        (swap_router_weights, {"uniform", "NaN weight"}),
        (wrap_wide_ids, {"foreign ids"}),
    ],
)
@pytest.mark.parametrize("budget", ["dense", "fp8"])
def test_a_bug_is_noticed(
    monkeypatch: pytest.MonkeyPatch, break_call: Callable[[Call], Call], noticed_by: set[str], budget: str
) -> None:
    right = suite.fused_experts
    if budget == "fp8":  # wide enough for quantised activations, tight enough for these
        monkeypatch.setattr(suite, "dense_tolerance", lambda *_: fp8_tolerance())

    def wrong(hidden, weights, topk_weights, topk_ids, expert_map, **options):
        call = {"hidden": hidden, "weights": weights, "topk_weights": topk_weights, "topk_ids": topk_ids}
        return right(**break_call(call | {"expert_map": expert_map} | options))

    monkeypatch.setattr(suite, "fused_experts", wrong)
    record = suite.run(PROBLEM, REFERENCE)
    assert not record.ok
    assert noticed_by <= failed(record)
    assert not failed(record, ORACLE)


def test_memory_that_is_never_written_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = suite.fused_experts

    def leaves_the_last_token(*args, out=None, **options):
        result = right(*args, **options)
        if out is None:
            return result
        out[:-1] = result[:-1]
        return out

    monkeypatch.setattr(suite, "fused_experts", leaves_the_last_token)
    assert failed(suite.run(PROBLEM, REFERENCE)) == set(KINDS)


def test_results_that_change_between_runs_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = suite.fused_experts

    def drifts(*args, out=None, **options):
        result = right(*args, out=out, **options)
        return result if out is None else result.copy_(torch.nextafter(result, torch.zeros_like(result)))

    monkeypatch.setattr(suite, "fused_experts", drifts)
    record = suite.run(PROBLEM, REFERENCE)
    case = next(case for case in record.cases if case.name == "uniform" and case.path == "reference")
    assert "rank 0: two runs differ" in case.failures


def test_a_bug_that_oracle_and_path_share_is_noticed_by_the_second_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    right = route_reference.local_experts

    def loses_the_first_route(topk_ids, expert_map):
        slots = right(topk_ids, expert_map)
        slots[0] = -1
        return slots

    monkeypatch.setattr(route_reference, "local_experts", loses_the_first_route)
    assert "uniform" in failed(suite.run(PROBLEM, REFERENCE), ORACLE)


def test_the_second_oracle_is_transformers_layer() -> None:
    modeling = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")
    configuration = pytest.importorskip("transformers.models.minimax_m3_vl.configuration_minimax_m3_vl")
    problem = replace(PROBLEM, ep_size=1, dtype=torch.float32)
    config = configuration.MiniMaxM3VLTextConfig(
        hidden_size=problem.hidden,
        intermediate_size=problem.intermediate,
        num_local_experts=problem.experts,
        num_experts_per_tok=problem.top_k,
        num_hidden_layers=1,
    )
    config._experts_implementation = "eager"
    theirs = modeling.MiniMaxM3VLExperts(config).requires_grad_(False)
    dense = rank_weights(problem, 0).dense_experts
    theirs.gate_up_proj.copy_(dense.w13)
    theirs.down_proj.copy_(dense.w2)
    theirs.to(torch.float64)
    for scenario in make_scenarios(problem):
        if scenario.name not in ("uniform", "skewed", "duplicates", "clamped", "outlier channel"):
            continue  # transformers knows no foreign ids
        total = torch.zeros_like(scenario.hidden, dtype=torch.float64)
        add_experts(total, 0, dense.w13, dense.w2, scenario, SwiGLUOAI())
        expected = theirs(scenario.hidden.double(), scenario.topk_ids.long(), scenario.topk_weights.double())
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


def test_experts_do_not_depend_on_the_number_of_ranks() -> None:
    whole = rank_weights(replace(PROBLEM, ep_size=1), 0).dense_experts
    second = rank_weights(PROBLEM, 1).dense_experts
    assert torch.equal(whole.w13[3:], second.w13)
    assert torch.equal(whole.w2[3:], second.w2)


def test_mxfp8_weights_pass_and_have_the_formats_corners() -> None:
    problem = replace(PROBLEM, hidden=96, intermediate=64)
    record = suite.run(problem, PACKED)
    assert record.ok, [case for case in record.cases if not case.ok]
    stack = rank_mxfp8(problem, 1).mxfp8_experts.w13
    dense = rank_weights(problem, 1).dense_experts.w13
    assert not stack.scales[:, ::7, 0].any()
    assert not stack.values[:, ::11, -32:].view(torch.uint8).any()
    close = torch.ones(stack.shape, dtype=torch.bool)
    close[:, ::7, :32] = close[:, ::11, -32:] = False
    assert snr_db(stack.dequantize(torch.float64)[close], dense.double()[close]) > 28


def test_a_wrong_scale_of_one_block_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = suite.in_format

    def doubles_a_scale(weights, form, target):
        parts = [
            part.clone() for w in (weights.mxfp8_experts.w13, weights.mxfp8_experts.w2) for part in (w.values, w.scales)
        ]
        parts[1][:, :, 1] += 1
        return right(ExpertWeights.mxfp8(*parts), form, target)

    monkeypatch.setattr(suite, "in_format", doubles_a_scale)
    record = suite.run(replace(PROBLEM, hidden=96, intermediate=64, tokens=(29,)), PACKED)
    assert {"uniform", "clamped", "one rank"} <= failed(record)
    assert not failed(record, ORACLE)


@pytest.mark.parametrize(
    ("form", "target"),
    [
        (form, PREPARED_FOR.get(form, target))
        for target, paths in READABLE.items()
        for form in dict.fromkeys(form for forms in paths.values() for form in forms)
        if form is not WeightFormat.DENSE
    ],
)
def test_every_format_holds_the_weights_and_the_source_is_kept(form: WeightFormat, target: Target) -> None:
    source = rank_mxfp8(replace(PROBLEM, hidden=128, intermediate=64), 0)
    before = source.mxfp8_experts.w13.dequantize(torch.float64)
    made = in_format(source, form, target)
    assert form in made.kept
    assert torch.equal(source.mxfp8_experts.w13.dequantize(torch.float64), before)
    assert snr_db(expert_matrix(made.kept[form].w13, 2, torch.float64), before[2]) > 80


@pytest.mark.parametrize("form", [WeightFormat.FRAGMENT, WeightFormat.MXFP8_FNUZ, WeightFormat.DENSE])
def test_no_format_is_judged_in_the_name_of_another(form: WeightFormat) -> None:
    with pytest.raises(ConfigError, match=f"can't be verified in {form.value}: on cpu they become mxfp8"):
        in_format(rank_mxfp8(replace(PROBLEM, hidden=128, intermediate=64), 0), form, Target.CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_path_of_the_gpu_passes(device: torch.device, dtype: torch.dtype) -> None:
    problem = replace(PROBLEM, hidden=160, intermediate=96, tokens=(1, 29, 300), dtype=dtype, device=device)
    record = suite.run(problem, subjects_of(problem, "all"))
    assert record.ok, [case for case in record.cases if not case.ok]
    assert {"graph replay"} == {case.name for case in record.cases if case.tolerance is None}


def on_target(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    """Make the CPU pass for ``target``: its kernels run in the interpreter."""
    for module in (api, problem_module):
        monkeypatch.setattr(module, "target_of", lambda device: target)


@pytest.mark.parametrize("target", [Target.GFX942, Target.GFX950])
def test_paths_with_fp8_activations_pass_in_the_interpreter(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels of another target")
    on_target(monkeypatch, target)
    numeric = ("uniform", "NaN weight", "clamped", "outlier channel", "zeros")  # the interpreter is slow
    monkeypatch.setattr(suite, "make_scenarios", lambda p: [s for s in make_scenarios(p) if s.name in numeric])
    problem = replace(PROBLEM, hidden=96, intermediate=64, ep_size=1, experts=3, top_k=2, tokens=(3,))
    subjects = [subject for path in ("w8a8", "block_fp8") for subject in subjects_of(problem, path)]
    assert {subject.combine for subject in subjects} == set(Combine)
    record = suite.run(problem, tuple(subjects))
    assert record.ok, [case for case in record.cases if not case.ok]


def test_subjects_of_the_device() -> None:
    dense = Subject(Path.BF16, Stored.DENSE, WeightFormat.DENSE)
    read = READABLE[Target.CPU][Path.W8A16]
    packed = [Subject(Path.W8A16, Stored.MXFP8, form) for form in read]
    assert read[:2] == (WeightFormat.MXFP8, WeightFormat.BLOCK_FP8)
    assert subjects_of(PROBLEM, "all") == (*REFERENCE, dense)
    assert subjects_of(PROBLEM, "auto") == (dense,)
    problem = replace(PROBLEM, hidden=96, intermediate=64)
    assert subjects_of(problem, "all") == (*REFERENCE, *PACKED, dense, *packed)
    assert set(subjects_of(problem, "auto")) == {dense, *packed}
    with pytest.raises(UnsupportedTarget, match=r"'w8a8' has no kernel for cpu with weights in mxfp8; it can run w8a"):
        subjects_of(problem, "w8a8")


def test_subjects_are_asked_for_with_the_products_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target alone stands for another product, whose tiles would be planned."""
    asked = []

    def decide(kind: policy.CallKind, tokens: int) -> policy.Decision:
        asked.append(kind.device_name)
        return policy.decide(kind, tokens)

    monkeypatch.setattr(subject_module, "decide", decide)
    with planning_for(Target.SM90, product="NVIDIA H200"):
        problem = Problem(6144, 3072, 128, 4, 2, (1,), torch.bfloat16, torch.device("meta"), 0)
        assert len(subjects_of(problem, "all")) > 3
    assert asked
    assert set(asked) == {"NVIDIA H200"}


def test_subjects_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_module, "target_of", lambda device: Target.SM90)
    problem = replace(PROBLEM, hidden=96, intermediate=64)
    found = [(s.path.value, s.form.value, s.combine.value) for s in subjects_of(problem, "all")]
    assert found == [
        ("reference", "dense", "deterministic"),
        ("reference", "mxfp8", "deterministic"),
        ("bf16", "dense", "deterministic"),
        ("w8a16", "fragment", "deterministic"),
        ("w8a16", "mxfp8", "deterministic"),
        ("w8a8", "row_fp8", "deterministic"),
        ("w8a8", "mxfp8", "deterministic"),
        ("w8a8", "mxfp8", "atomic"),
        ("block_fp8", "block_fp8", "deterministic"),
        ("block_fp8", "block_fp8", "atomic"),
    ]
    half = replace(problem, dtype=torch.float16)
    assert {s.path for s in subjects_of(half, "all")} == {Path.REFERENCE, Path.BF16}
    assert [s.form for s in subjects_of(half, "auto")] == [WeightFormat.DENSE]
    assert [s.path for s in subjects_of(PROBLEM, "all")] == [Path.REFERENCE, Path.BF16]
    with pytest.raises(ConfigError, match="hidden is 40 and intermediate 24; path 'w8a8' has MXFP8 weights"):
        subjects_of(PROBLEM, "w8a8")
