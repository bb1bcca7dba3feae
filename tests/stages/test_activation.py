"""Activations are an open set: what a new kind needs, shown on one that only these tests know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import triton
import triton.language as tl

from epfuse import Path, SwiGLUOAI, Target, fused_experts
from epfuse.compile_ops import take_apart, traced_experts
from epfuse.config import MINIMAX_M3_EP8 as M3
from epfuse.config import Activation, Combine, WeightFormat
from epfuse.errors import ConfigError, UnsupportedTarget
from epfuse.families.family import CallKind
from epfuse.families.portable import PORTABLE, Portable
from epfuse.families.registry import FAMILIES, serving
from epfuse.policy import decide
from epfuse.policy.call import path_refusals
from epfuse.stages.activate.launch import launch_activate
from epfuse.stages.activation_reference import REFERENCES
from epfuse.stages.gate_up import reference as gate_up_reference
from epfuse.stages.gate_up.launch import launch_gate_up
from epfuse.stages.quantize.rows import FP8Rows
from tests.cases import make_case, snr_db
from tests.stages.test_gemms import TILE, check_rows, local_rows, poisoned, routes_of

DENSE = frozenset({WeightFormat.DENSE})


@dataclass(frozen=True)
class Squared(Activation):
    """``relu(gate) ** 2 * (up + shift)``."""

    kind: ClassVar[str] = "squared"

    shift: float = 0.5

    @property
    def parameters(self) -> tuple[float, ...]:
        return (self.shift,)


@triton.jit
def squared(gate, up, activation, ACTIVATION: tl.constexpr):
    tl.static_assert(ACTIVATION == "squared")
    gate = tl.where(gate < 0.0, 0.0, gate)
    return gate * gate * (up + activation[0])


def squared_reference(gate_up: torch.Tensor, activation: Squared) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate.relu() ** 2 * (up + activation.shift)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squared where a new kind would be entered: the device function, the reference, one family."""
    monkeypatch.setattr("epfuse.stages.gate_up.kernel.activate", squared)
    monkeypatch.setattr("epfuse.stages.activate.kernel.activate", squared)
    monkeypatch.setitem(REFERENCES, Squared.kind, squared_reference)
    monkeypatch.setattr(Portable, "activations", frozenset({SwiGLUOAI, Squared}))


@pytest.mark.usefixtures("known")
@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels keep the function that they were compiled with")
def test_a_new_kind_runs_on_the_portable_kernels() -> None:
    case = make_case(torch.device("cpu"), scale=4.0)
    routes, w13 = routes_of(case), case.weights.dense_experts.w13
    out = poisoned(routes.num_routes, case.weights.intermediate, case.hidden)
    launch_gate_up(case.hidden, w13, routes, 4, Squared(), TILE, out)
    want = gate_up_reference.gate_up(case.hidden, w13, routes, 4, Squared(), torch.float64)
    check_rows(out, want, local_rows(case), 44.0)  # a square doubles the relative error of the rounded gate
    rows = local_rows(case)
    gate_up = torch.randn(routes.num_routes, 192).bfloat16()
    made = FP8Rows.empty(routes.num_routes, 96, 32, torch.float8_e4m3fn, gate_up.device)
    codes = launch_activate(gate_up, routes, Squared(), made).dequantize(torch.float64)[rows]
    assert snr_db(codes, squared_reference(gate_up.double(), Squared())[rows]) > 28.0


@pytest.mark.usefixtures("known")
def test_a_new_kind_is_decided_for_the_families_that_have_it() -> None:
    assert decide(CallKind(Path.BF16, Target.SM90, M3, DENSE), 64).family is not PORTABLE
    decision = decide(CallKind(Path.BF16, Target.SM90, M3, DENSE, activation=Squared), 64)
    assert decision.family is PORTABLE
    assert serving(CallKind(Path.BF16, Target.SM90, M3, activation=Squared)) == (PORTABLE,)
    with pytest.raises(UnsupportedTarget, match="weights in block_fp8, activation Squared; it can run reference"):
        decide(CallKind(Path.BLOCK_FP8, Target.SM90, M3, frozenset({WeightFormat.BLOCK_FP8}), activation=Squared), 64)


@pytest.mark.usefixtures("known")
def test_a_new_kind_runs_on_the_reference_path() -> None:
    case = make_case(torch.device("cpu"), dtype=torch.float32)
    operands = (case.hidden, case.weights, case.topk_weights, case.topk_ids, case.expert_map)
    one, two = (fused_experts(*operands, activation=Squared(shift), path=Path.REFERENCE) for shift in (0.5, 1.5))
    assert not torch.equal(one, two)


def test_a_kind_that_nobody_has_is_refused_in_words() -> None:
    for family in FAMILIES:
        target, paths = next(iter(family.reads.items()))
        path, forms = next(iter(paths.items()))
        refusal = family.accepts(CallKind(path, target, M3, frozenset({forms[0]}), activation=Squared))
        assert refusal == f"{family.name} has no code for Squared."
    refusals = path_refusals(CallKind(Path.AUTO, Target.SM90, M3, DENSE, activation=Squared))
    assert refusals[Path.BF16] == "It has no code for Squared."
    with pytest.raises(UnsupportedTarget, match="weights in dense, activation Squared; it can run reference"):
        decide(CallKind(Path.BF16, Target.GFX942, M3, DENSE, activation=Squared), 64)
    case = make_case(torch.device("cpu"))
    operands = (case.hidden, case.weights, case.topk_weights, case.topk_ids, case.expert_map)
    with pytest.raises(ConfigError, match=r"activation is Squared\(shift=0.5\); its kind must be one of swiglu_oai"):
        fused_experts(*operands, activation=Squared(), path=Path.REFERENCE)
    with pytest.raises(ConfigError, match=r"activation is a str; it must be an epfuse\.SwiGLUOAI"):
        fused_experts(*operands, activation="silu")


@pytest.mark.usefixtures("known")
@torch.no_grad()
def test_a_traced_call_carries_any_kind() -> None:
    case = make_case(torch.device("cpu"), tokens=3)
    operands = (case.hidden, case.weights, case.topk_weights, case.topk_ids, case.expert_map)
    call = (*operands, Squared(0.25), Path.REFERENCE, Combine.DETERMINISTIC, None)
    assert torch.equal(traced_experts(*call), fused_experts(*operands, activation=Squared(0.25), path=Path.REFERENCE))


def test_a_graph_with_an_unknown_kind_is_refused() -> None:
    case = make_case(torch.device("cpu"), tokens=3)
    formats, tensors = take_apart(case.weights)
    routes = case.topk_weights, case.topk_ids, case.expert_map.on(case.hidden.device)
    with pytest.raises(ConfigError, match=r"'tomorrows'; known are .*swiglu_oai"):
        torch.ops.epfuse.fused_experts(
            case.hidden, tensors, formats, 4, 48, *routes, "tomorrows", [], "reference", "deterministic"
        )
