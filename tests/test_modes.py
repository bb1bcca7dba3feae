"""What torch's modes and the weights' flags must not change, and activations of any numbers on every path."""

from __future__ import annotations

from fractions import Fraction

import numpy
import pytest
import torch
from torch.autograd import forward_ad

import epfuse.api
from epfuse import ExpertMap, ExpertWeights, Path, SwiGLUOAI, Target, fused_experts
from epfuse.errors import ConfigError
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.reference import run_reference
from epfuse.target import REFERENCE_DEVICE
from tests.cases import Case, make_case, snr_db

CPU = torch.device("cpu")


def call(case: Case, weights: ExpertWeights | None = None, **options: object) -> torch.Tensor:
    given = case.weights if weights is None else weights
    return fused_experts(case.hidden, given, case.topk_weights, case.topk_ids, case.expert_map, **options)


def on_gfx950(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epfuse.api, "target_of", lambda device: Target.GFX950)
    monkeypatch.setattr(epfuse.api, "device_name", lambda device: REFERENCE_DEVICE[Target.GFX950])


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit_of_the_reference(cast: torch.dtype) -> None:
    case = make_case(CPU, dtype=torch.float32)
    want = call(case)
    exact = run_reference(
        case.hidden, case.weights, case.topk_weights, case.topk_ids, case.expert_map, SwiGLUOAI(), torch.float64
    )
    with torch.autocast("cpu", dtype=cast):
        got = call(case)
        again = run_reference(
            case.hidden, case.weights, case.topk_weights, case.topk_ids, case.expert_map, SwiGLUOAI(), torch.float64
        )
    assert torch.equal(got, want)
    assert torch.equal(again, exact)
    assert snr_db(got, exact) > 115


def test_autocast_changes_no_bit_of_a_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(device, tokens=3, hidden=32, intermediate=32, experts=2, local=2, top_k=2)
    if device.type == "cpu":
        on_gfx950(monkeypatch)
    want = call(case, path=Path.BF16)
    with torch.autocast(device.type, dtype=torch.float16):
        assert torch.equal(call(case, path=Path.BF16), want)


def test_steps_are_ranges_of_a_profiler_and_cost_nothing_without_one(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(device, tokens=3, hidden=32, intermediate=32, experts=2, local=2, top_k=2)
    if device.type == "cpu":
        on_gfx950(monkeypatch)
    want = call(case, path=Path.BF16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watch:
        assert torch.equal(call(case, path=Path.BF16), want)
    names = [event.name for event in watch.events() if event.name.startswith("epfuse::")]
    assert names == [f"epfuse::{stage}" for stage in ("route", "gate_up", "down", "combine")]
    monkeypatch.setattr(epfuse.api, "record_function", lambda name: pytest.fail(f"{name}: nobody is watching"))
    assert torch.equal(call(case, path=Path.BF16), want)


def parameters(case: Case) -> ExpertWeights:
    dense = case.weights.dense_experts
    return ExpertWeights.dense(torch.nn.Parameter(dense.w13), torch.nn.Parameter(dense.w2))


def test_parameters_give_a_result_without_a_graph() -> None:
    case = make_case(CPU, dtype=torch.float32)
    weights = parameters(case)
    got = call(case, weights)
    assert not got.requires_grad
    assert torch.equal(got, call(case))
    out = torch.empty_like(case.hidden)
    assert not call(case, weights, out=out).requires_grad
    assert torch.equal(out, got)
    assert not run_reference(
        case.hidden, weights, case.topk_weights, case.topk_ids, case.expert_map, SwiGLUOAI(), torch.float64
    ).requires_grad
    quantised = ExpertWeights.quantize(parameters(make_case(CPU, intermediate=64)))
    assert not quantised.mxfp8_experts.w13.values.requires_grad


def test_parameters_on_a_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(device, tokens=3, hidden=32, intermediate=32, experts=2, local=2, top_k=2)
    if device.type == "cpu":
        on_gfx950(monkeypatch)
    got = call(case, parameters(case), path=Path.BF16)
    assert not got.requires_grad
    assert torch.equal(got, call(case, path=Path.BF16))


@pytest.mark.parametrize("target", [Target.SM90, Target.GFX942])
def test_parameters_and_tensors_of_inference_mode_are_prepared(target: Target) -> None:
    rng = torch.Generator().manual_seed(0)
    stacks = [torch.randn(1, 128, 128, generator=rng), torch.randn(1, 128, 64, generator=rng)]
    plain = [part for w in map(MXFP8.quantize, stacks) for part in (w.values, w.scales)]
    with torch.inference_mode():
        inference = [part.clone() for part in plain]
    own = [torch.nn.Parameter(part.clone(), requires_grad=part.is_floating_point()) for part in plain]
    want = ExpertWeights.mxfp8(*(part.clone() for part in plain)).prepare(target)
    for parts in (inference, own):
        got = ExpertWeights.mxfp8(*parts).prepare(target)
        form = next(iter(want.kept))
        for name in ("w13", "w2"):
            ours, theirs = getattr(got.kept[form], name), getattr(want.kept[form], name)
            codes = "values" if target is Target.GFX942 else "codes"
            assert torch.equal(getattr(ours, codes).view(torch.uint8), getattr(theirs, codes).view(torch.uint8))
            assert torch.equal(ours.scales, theirs.scales)


def test_derivatives_and_batches_that_would_be_lost_are_refused() -> None:
    case = make_case(CPU, dtype=torch.float32)

    def layer(hidden: torch.Tensor) -> torch.Tensor:
        return fused_experts(hidden, case.weights, case.topk_weights, case.topk_ids, case.expert_map)

    with pytest.raises(ConfigError, match=r"hidden is traced by torch\.func"):
        torch.vmap(layer)(case.hidden[None])
    with (
        pytest.warns(DeprecationWarning, match="jit"),
        pytest.raises(ConfigError, match=r"torch\.jit\.trace records nothing"),
    ):
        torch.jit.trace(layer, (case.hidden,))
    with pytest.raises(ConfigError, match="hidden"):
        torch.func.jvp(layer, (case.hidden,), (torch.ones_like(case.hidden),))
    with forward_ad.dual_level():
        with pytest.raises(ConfigError, match="hidden has a tangent"):
            layer(forward_ad.make_dual(case.hidden, torch.ones_like(case.hidden)))
        assert torch.equal(layer(case.hidden), call(case))


def test_out_may_be_a_tensor_of_inference_mode() -> None:
    case = make_case(CPU)
    with torch.inference_mode():
        out = torch.empty_like(case.hidden)
    assert torch.equal(call(case, out=out), call(case))
    with torch.inference_mode():
        inside = call(case)
    assert torch.equal(inside, call(case))
    nothing = ExpertWeights.bf16(case.weights.dense_experts.w13[:0], case.weights.dense_experts.w2[:0])
    args = (case.hidden, nothing, case.topk_weights, case.topk_ids, ExpertMap(torch.full((16,), -1)))
    assert not fused_experts(*args, out=out).any()


@pytest.mark.parametrize(
    "numbers", [(1, 0, 10), (1, 1, 7), (numpy.float32(1), numpy.int64(0), Fraction(10)), (True + 0, 0.0, float("inf"))]
)
def test_an_activations_numbers_are_floats(numbers: tuple[object, ...]) -> None:
    activation = SwiGLUOAI(*numbers)
    assert [type(value) for value in (activation.alpha, activation.beta, activation.limit)] == [float] * 3
    assert activation == SwiGLUOAI(*map(float, numbers))
    assert hash(activation) == hash(SwiGLUOAI(*map(float, numbers)))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("alpha", 10**400, "an integer of 1329 bits; it must be within float32's range"),
        ("limit", 10**400, "within float32's range"),
        ("beta", 1e39, "1e+39; it must be within float32's range"),
        ("limit", 1e39, "1e+39; it must be within float32's range, +-3.4e+38"),
        ("limit", 1e-60, "1e-60; it must be positive, above"),
        ("beta", float("-inf"), "it must be finite"),
        ("alpha", numpy.bool_(True), "must be a number"),
        ("alpha", 1j, "must be a number"),
        ("alpha", torch.tensor(1.0), "a Tensor; it must be a number"),
    ],
)
def test_numbers_that_kernels_can_not_take(field: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SwiGLUOAI(**{field: value})
    assert f"SwiGLUOAI.{field} is" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("path", [path for path in Path if path is not Path.AUTO])
@pytest.mark.parametrize("numbers", [(1, 0, 10), (1, 1, 3.4e38)])
def test_every_path_takes_any_activation(
    path: Path, numbers: tuple[float, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """silu with a clamp at 10 (DeepSeek-V4, GLM-5-Next, HY-V4), far into the clamp."""
    case = make_case(device, tokens=3, hidden=64, intermediate=32, experts=2, local=2, top_k=2, scale=16.0)
    packed = ExpertWeights.quantize(case.weights)
    weights = case.weights if path in (Path.BF16, Path.REFERENCE) else packed
    if path is Path.BLOCK_FP8:
        stacks = packed.mxfp8_experts
        weights = ExpertWeights.block_fp8(stacks.w13.values, stacks.w13.scales, stacks.w2.values, stacks.w2.scales)
    if device.type == "cpu":
        on_gfx950(monkeypatch)
    activation = SwiGLUOAI(*numbers)
    got = call(case, weights, path=path, activation=activation)
    exact = run_reference(
        case.hidden, weights, case.topk_weights, case.topk_ids, case.expert_map, activation, torch.float64
    )
    assert snr_db(got, exact) > (20 if path in (Path.W8A8, Path.BLOCK_FP8) else 42)
    if numbers[2] == 10:
        assert (case.hidden.float() @ case.weights.dense_experts.w13[0].float().T).abs().max() > 20  # the clamp bites
