"""The suite passes what is right and fails every kind of bug that it is there for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from epfuse import ExpertMap, ExpertWeights, Path, SwiGLUOAI
from epfuse.stages.route import reference as route_reference
from epfuse.verify import suite
from epfuse.verify.experts import rank_weights
from epfuse.verify.oracle import add_experts
from epfuse.verify.problem import Problem, paths_of
from epfuse.verify.record import ORACLE
from epfuse.verify.scenarios import KINDS, make_scenarios

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

Call = dict[str, Any]


def failed(record: suite.Record, path: str = "reference") -> set[str]:
    return {case.name for case in record.cases if case.path == path and not case.ok}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_reference_path_passes(dtype: torch.dtype, seed: int) -> None:
    steps: list[None] = []
    problem = replace(PROBLEM, dtype=dtype, seed=seed)
    record = suite.run(problem, (Path.REFERENCE,), lambda: steps.append(None))
    assert record.ok, [case for case in record.cases if not case.ok]
    assert len(record.cases) == 2 * 2 * len(KINDS)
    assert len(steps) == suite.steps_of(problem)


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
def test_a_bug_is_noticed(
    monkeypatch: pytest.MonkeyPatch, break_call: Callable[[Call], Call], noticed_by: set[str]
) -> None:
    right = suite.fused_experts

    def wrong(hidden, weights, topk_weights, topk_ids, expert_map, **options):
        call = {"hidden": hidden, "weights": weights, "topk_weights": topk_weights, "topk_ids": topk_ids}
        return right(**break_call(call | {"expert_map": expert_map} | options))

    monkeypatch.setattr(suite, "fused_experts", wrong)
    record = suite.run(PROBLEM, (Path.REFERENCE,))
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
    assert failed(suite.run(PROBLEM, (Path.REFERENCE,))) == set(KINDS)


def test_results_that_change_between_runs_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = suite.fused_experts

    def drifts(*args, out=None, **options):
        result = right(*args, out=out, **options)
        return result if out is None else result.copy_(torch.nextafter(result, torch.zeros_like(result)))

    monkeypatch.setattr(suite, "fused_experts", drifts)
    record = suite.run(PROBLEM, (Path.REFERENCE,))
    case = next(case for case in record.cases if case.name == "uniform" and case.path == "reference")
    assert "rank 0: two runs differ" in case.failures


def test_a_bug_that_oracle_and_path_share_is_noticed_by_the_second_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    right = route_reference.local_experts

    def loses_the_first_route(topk_ids, expert_map):
        slots = right(topk_ids, expert_map)
        slots[0] = -1
        return slots

    monkeypatch.setattr(route_reference, "local_experts", loses_the_first_route)
    assert "uniform" in failed(suite.run(PROBLEM, (Path.REFERENCE,)), ORACLE)


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_path_of_the_gpu_passes(device: torch.device, dtype: torch.dtype) -> None:
    problem = replace(PROBLEM, hidden=136, intermediate=88, tokens=(1, 29, 300), dtype=dtype, device=device)
    record = suite.run(problem, paths_of(problem, "all"))
    assert record.ok, [case for case in record.cases if not case.ok]
    assert {"graph replay"} == {case.name for case in record.cases if case.tolerance is None}


def test_paths_of_the_device() -> None:
    assert paths_of(PROBLEM, "all") == (Path.REFERENCE,)
    assert paths_of(PROBLEM, "auto") == (Path.REFERENCE,)
