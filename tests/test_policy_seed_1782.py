"""Policy `seed-1782`: a test for each sentence of InferenceX pull request 1782 and of what it is stacked on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epfuse import LayerShape, Path, SwiGLUOAI, Target
from epfuse.config import Bias, Policy
from epfuse.policy import Checkpoint, LayerPlan, LayerRequest, PathVerdict, Storage, plan_layer
from epfuse.policy.seed_1782 import BRANCHES, GATES

MOE_LAYERS = tuple(range(3, 60))
EP8 = LayerRequest(
    target=Target.GFX942,
    shape=LayerShape(hidden=6144, intermediate=3072, experts=128, local_experts=16, top_k=4),
    ep_size=8,
    max_model_len=2304,
    layer=3,
    moe_layers=MOE_LAYERS,
    shared_experts=1,
)
EP1 = replace(EP8, ep_size=1, shape=replace(EP8.shape, local_experts=128))


def seed(request: LayerRequest, **changes: Any) -> LayerPlan:
    return plan_layer(replace(request, **changes), Policy.SEED_1782)


def paths(plan: LayerPlan) -> list[tuple[int, int | None, Path]]:
    """Ranges with neighbours on the same path joined."""
    found: list[tuple[int, int | None, Path]] = []
    for entry in plan.ranges:
        if found and found[-1][2] is entry.decision.path:
            found[-1] = (found[-1][0], entry.max_tokens, entry.decision.path)
        else:
            found.append((entry.min_tokens, entry.max_tokens, entry.decision.path))
    return found


MIXED = [(1, 8, Path.BF16), (9, 831, Path.W8A8), (832, None, Path.BF16)]


@pytest.mark.parametrize("request_", [EP8, EP1], ids=["EP8", "EP1"])
@pytest.mark.parametrize("max_model_len", [1, 2304, 4096])
def test_short_context_selects_the_native_mxfp8_backend_with_the_mixed_native_bf16_expert_policy(
    request_: LayerRequest, max_model_len: int
) -> None:
    plan = seed(request_, max_model_len=max_model_len)
    assert plan.storage is Storage.HYBRID
    assert paths(plan) == MIXED


@pytest.mark.parametrize(("tokens", "path"), [(8, Path.BF16), (9, Path.W8A8), (831, Path.W8A8), (832, Path.BF16)])
def test_bf16_at_or_below_8_tokens_and_at_or_above_832_and_native_between(tokens: int, path: Path) -> None:
    assert seed(EP8).at(tokens).path is path


def test_the_mixed_policy_is_extended_to_ep8() -> None:
    assert paths(seed(EP8)) == paths(seed(EP1))


@pytest.mark.parametrize("layer", MOE_LAYERS)
def test_long_context_ep8_switches_to_a_sparse_local_route_bf16_path_in_every_layer(layer: int) -> None:
    plan = seed(EP8, max_model_len=9472, layer=layer)
    assert plan.storage is Storage.BF16
    assert paths(plan) == [(1, None, Path.BF16)]


def test_long_context_begins_after_4096() -> None:
    assert seed(EP8, max_model_len=4096).storage is Storage.HYBRID
    assert seed(EP8, max_model_len=4097).storage is Storage.BF16


@pytest.mark.parametrize("layer", [layer for layer in MOE_LAYERS if layer % 5 == 0])
def test_long_context_ep1_keeps_bf16_only_in_every_fifth_layer(layer: int) -> None:
    plan = seed(EP1, max_model_len=9472, layer=layer)
    assert plan.storage is Storage.BF16
    assert paths(plan) == [(1, None, Path.BF16)]


@pytest.mark.parametrize("layer", [layer for layer in MOE_LAYERS if layer % 5])
def test_long_context_ep1_keeps_both_in_the_other_layers(layer: int) -> None:
    plan = seed(EP1, max_model_len=9472, layer=layer)
    assert plan.storage is Storage.HYBRID
    assert paths(plan) == MIXED


@pytest.mark.parametrize("layer", [4, 5])
def test_ep1_under_tensor_parallelism_is_the_same_model(layer: int) -> None:
    split = seed(EP1, shape=replace(EP1.shape, intermediate=384), tp_size=8, max_model_len=9472, layer=layer)
    whole = seed(EP1, max_model_len=9472, layer=layer)
    assert (split.storage, paths(split)) == (whole.storage, paths(whole))
    assert split.nbytes * 8 == whole.nbytes


FOREIGN: dict[str, dict[str, Any]] = {
    "gfx95x": {"target": Target.GFX950},
    "hopper": {"target": Target.SM90},
    "cpu": {"target": Target.CPU},
    "experts": {"shape": replace(EP8.shape, experts=64, local_experts=8)},
    "top_k": {"shape": replace(EP8.shape, top_k=8)},
    "hidden": {"shape": replace(EP8.shape, hidden=4096)},
    "intermediate": {"shape": replace(EP8.shape, intermediate=1536)},
    "no shared expert": {"shared_experts": 0},
    "two shared experts": {"shared_experts": 2},
    "ep_size": {"ep_size": 4, "shape": replace(EP8.shape, local_experts=32)},
    "checkpoint": {"checkpoint": Checkpoint.BF16},
    "activation": {"activation": SwiGLUOAI(alpha=1.0)},
    "biases": {"bias": Bias.ADDED},
}


@pytest.mark.parametrize("max_model_len", [2304, 9472])
@pytest.mark.parametrize("name", list(FOREIGN))
def test_gfx95x_and_other_models_and_configurations_are_unchanged(name: str, max_model_len: int) -> None:
    plan = seed(EP8, max_model_len=max_model_len, **FOREIGN[name])
    assert plan.is_untouched
    assert plan.ranges == ()
    assert plan.nbytes == 0
    assert "the profiled layer has" in plan.reason


SIZES = st.builds(
    LayerShape,
    hidden=st.sampled_from([2880, 4096, 6144]),
    intermediate=st.sampled_from([384, 1536, 3072]),
    experts=st.sampled_from([64, 128, 256]),
    local_experts=st.just(1),
    top_k=st.sampled_from([2, 4, 8]),
)


@given(
    target=st.sampled_from(list(Target)),
    sizes=SIZES,
    ep_size=st.sampled_from([1, 2, 4, 8, 16]),
    max_model_len=st.sampled_from([2304, 4096, 4097, 9472]),
    layer=st.sampled_from(MOE_LAYERS),
    shared_experts=st.sampled_from([0, 1, 2]),
    checkpoint=st.sampled_from(list(Checkpoint)),
    activation=st.sampled_from([SwiGLUOAI(), SwiGLUOAI(alpha=1.0, beta=0.0)]),
)
def test_nothing_but_the_profiled_shapes_changes(
    target: Target,
    sizes: LayerShape,
    ep_size: int,
    max_model_len: int,
    layer: int,
    shared_experts: int,
    checkpoint: Checkpoint,
    activation: SwiGLUOAI,
) -> None:
    shape = replace(sizes, local_experts=sizes.experts // ep_size)
    request = LayerRequest(
        target, shape, ep_size, max_model_len, layer, MOE_LAYERS, activation, checkpoint, shared_experts
    )
    profiled = (
        target is Target.GFX942
        and (shape.experts, shape.top_k, shape.hidden, shape.intermediate) == (128, 4, 6144, 3072)
        and shared_experts == 1
        and ep_size in (1, 8)
        and checkpoint is Checkpoint.MXFP8
        and activation == SwiGLUOAI()
    )
    assert plan_layer(request, Policy.SEED_1782).is_untouched == (not profiled)


def test_every_gate_can_refuse_and_every_branch_can_be_taken() -> None:
    assert {next(g.name for g in GATES if g.refusal(replace(EP8, **changes))) for changes in FOREIGN.values()} == {
        gate.name for gate in GATES
    }
    requests = [
        replace(request, max_model_len=length, layer=layer)
        for request in (EP8, EP1)
        for length in (2304, 9472)
        for layer in (4, 5)
    ]
    assert {plan_layer(request, Policy.SEED_1782).reason for request in requests} == {b.sentence for b in BRANCHES}


def test_weights_that_are_stored_otherwise_are_untouched() -> None:
    plan = seed(EP8, stored=Storage.MXFP8)
    assert plan.is_untouched
    assert plan.reason == "What is stored is mxfp8; the seed keeps hybrid here."


def test_every_path_is_taken_or_refused_with_a_sentence() -> None:
    for tokens in (1, 64, 1024):
        decision = seed(EP8).at(tokens)
        assert {entry.path for entry in decision.considered} == set(Path) - {Path.AUTO}
        assert [entry.verdict for entry in decision.considered].count(PathVerdict.TAKEN) == 1
        assert all(entry.reason.endswith(".") for entry in decision.considered)
        assert all(entry.path is not decision.path for entry in decision.refused)
