"""fused_experts: right against transformers' own experts; bad input is refused by an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import epfuse
from epfuse import Combine, EpfuseError, ExpertMap, ExpertWeights, LayerShape, Path, SwiGLUOAI, fused_experts, silu_gate
from epfuse.arguments import shown
from epfuse.errors import ConfigError, DeviceError, DtypeError, LayoutError, ShapeError, UnsupportedTarget
from tests.cases import Case, make_case, snr_db

CPU = torch.device("cpu")


def call(case: Case, **changes: Any) -> torch.Tensor:
    arguments = {
        "hidden": case.hidden,
        "weights": case.weights,
        "topk_weights": case.topk_weights,
        "topk_ids": case.topk_ids,
        "expert_map": case.expert_map,
    }
    return fused_experts(**(arguments | changes))


@pytest.mark.parametrize(("dtype", "least_db"), [(torch.float32, 115), (torch.bfloat16, 40)])
@pytest.mark.parametrize("tokens", [1, 3, 37])
def test_equals_the_experts_of_transformers(dtype: torch.dtype, least_db: float, tokens: int) -> None:
    modeling = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")
    configuration = pytest.importorskip("transformers.models.minimax_m3_vl.configuration_minimax_m3_vl")
    config = configuration.MiniMaxM3VLTextConfig(
        hidden_size=64, intermediate_size=48, num_local_experts=8, num_experts_per_tok=4, num_hidden_layers=1
    )
    config._experts_implementation = "eager"
    torch.manual_seed(tokens)
    theirs = modeling.MiniMaxM3VLExperts(config).requires_grad_(False)
    for weight in theirs.parameters():
        weight.normal_(std=0.3)  # the clamp at 7 bites
    theirs.to(dtype)
    hidden = 2 * torch.randn(tokens, 64).to(dtype)
    scores, ids = torch.rand(tokens, 8).topk(4)

    weights = ExpertWeights.dense(theirs.gate_up_proj.data, theirs.down_proj.data)
    activation = SwiGLUOAI(alpha=config.swiglu_alpha, limit=config.swiglu_limit)
    ours = fused_experts(hidden, weights, scores, ids, ExpertMap.all_local(8), activation=activation)

    exact = theirs.to(torch.float64)(hidden.double(), ids, scores.double())
    assert snr_db(ours, exact) > least_db


def test_more_routes_than_experts() -> None:
    """Ids may be local ones, or repeat: each route counts."""
    case = make_case(CPU, tokens=3, experts=2, local=2, top_k=2, dtype=torch.float32)
    ids = torch.tensor([[0, -1, 1, -1], [1, 1, 1, 1], [-1, -1, -1, -1]])
    scores = torch.rand(3, 4)
    got = call(case, topk_ids=ids, topk_weights=scores, expert_map=ExpertMap.all_local(2))
    want = call(
        case,
        topk_ids=torch.tensor([[0, 1], [1, -1], [-1, -1]]),
        topk_weights=torch.stack(
            [torch.stack([scores[0, 0], scores[0, 2]]), scores[1].sum()[None].expand(2), scores[2, :2]]
        ),
    )
    torch.testing.assert_close(got, want)


def test_out_is_written_and_returned() -> None:
    case = make_case(CPU)
    out = torch.full_like(case.hidden, torch.nan)
    result = call(case, out=out)
    assert result is out
    assert torch.equal(out, call(case))


def test_kernels_are_launched_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton asks for the current device, at a plan's look-up and at each launch."""
    events: list[object] = []

    @contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        events.append(device)
        yield
        events.append("left")

    def steps(decision: object, call: object) -> Iterator[tuple[str, Callable[[], object]]]:
        events.append("looked up")
        yield "one", lambda: events.append("launched")

    monkeypatch.setattr("epfuse.api.on_device", on_device)
    monkeypatch.setattr("epfuse.api.PLANS", SimpleNamespace(steps=steps))
    case = make_case(CPU, 3, dtype=torch.float32)
    call(case, path=Path.BF16)
    assert events == [CPU, "looked up", "launched", "left"]


def test_no_tokens() -> None:
    assert call(make_case(CPU, tokens=0)).shape == (0, 64)


def test_a_rank_without_experts_contributes_zero() -> None:
    case = make_case(CPU)
    weights = ExpertWeights.bf16(case.weights.dense_experts.w13[:0], case.weights.dense_experts.w2[:0])
    expert_map = ExpertMap(torch.full((16,), -1))
    assert not call(case, weights=weights, expert_map=expert_map).any()


def test_a_nan_router_weight_reaches_only_its_token() -> None:
    case = make_case(CPU)
    ids = case.topk_ids.clone()
    ids[5, 2] = 0  # local
    poisoned = case.topk_weights.clone()
    poisoned[5, 2] = torch.nan
    result, clean = call(case, topk_weights=poisoned, topk_ids=ids), call(case, topk_ids=ids)
    others = torch.arange(37) != 5
    assert result[5].isnan().all()
    assert torch.equal(result[others], clean[others])


def test_silu_gate_is_the_plain_gated_unit() -> None:
    case = make_case(CPU, tokens=3, experts=4, local=4, top_k=1, dtype=torch.float32)
    w = case.weights.dense_experts
    expected = torch.empty_like(case.hidden)
    for t in range(3):
        expert = int(case.topk_ids[t, 0])
        gate, up = (w.w13[expert] @ case.hidden[t]).chunk(2)
        expected[t] = case.topk_weights[t, 0] * (w.w2[expert] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(call(case, activation=silu_gate()), expected)


Change = Callable[[Case], dict[str, Any]]

BAD_CALLS: list[tuple[str, Change, type[EpfuseError], tuple[str, ...]]] = [
    ("hidden, a list", lambda c: {"hidden": [[1.0]]}, ConfigError, ("hidden is a list", "torch.Tensor")),
    ("hidden, one dimension", lambda c: {"hidden": c.hidden[0]}, ShapeError, ("hidden has shape (64,)", "two")),
    (
        "hidden, wrong width",
        lambda c: {"hidden": c.hidden[:, :32].contiguous()},
        ShapeError,
        ("hidden has shape (37, 32)", "H=64"),
    ),
    ("hidden, wrong dtype", lambda c: {"hidden": c.hidden.float()}, DtypeError, ("hidden", "float32", "bfloat16")),
    ("hidden, strided", lambda c: {"hidden": c.hidden.T.contiguous().T}, LayoutError, ("hidden has strides", "contig")),
    ("hidden, other device", lambda c: {"hidden": c.hidden.to("meta")}, DeviceError, ("hidden is on meta", "cpu")),
    (
        "hidden requires grad",
        lambda c: {"hidden": c.hidden.clone().requires_grad_()},
        ConfigError,
        ("hidden requires grad", "no_grad"),
    ),
    (
        "weights, a tensor",
        lambda c: {"weights": c.weights.dense_experts.w13},
        ConfigError,
        ("weights is a Tensor", "ExpertWeights"),
    ),
    (
        "ids, floating",
        lambda c: {"topk_ids": c.topk_ids.float()},
        DtypeError,
        ("topk_ids", "float32", "int32 or int64"),
    ),
    ("ids, rows", lambda c: {"topk_ids": c.topk_ids[:5]}, ShapeError, ("topk_ids has 5 rows", "T=37")),
    ("ids, flat", lambda c: {"topk_ids": c.topk_ids.view(-1)}, ShapeError, ("topk_ids has shape (148,)", "two")),
    (
        "ids, strided",
        lambda c: {"topk_ids": c.topk_ids.T.contiguous().T},
        LayoutError,
        ("topk_ids has strides", "contiguous"),
    ),
    ("ids, other device", lambda c: {"topk_ids": c.topk_ids.to("meta")}, DeviceError, ("topk_ids is on meta", "cpu")),
    (
        "no routes",
        lambda c: {"topk_ids": c.topk_ids[:, :0], "topk_weights": c.topk_weights[:, :0]},
        ShapeError,
        ("topk_ids has shape (37, 0)", "K at least 1"),
    ),
    (
        "router weights, wrong dtype",
        lambda c: {"topk_weights": c.topk_weights.bfloat16()},
        DtypeError,
        ("topk_weights", "bfloat16", "float32"),
    ),
    (
        "router weights, wrong shape",
        lambda c: {"topk_weights": c.topk_weights[:, :3].contiguous()},
        ShapeError,
        ("topk_weights has shape (37, 3)", "(37, 4)"),
    ),
    (
        "map, a tensor",
        lambda c: {"expert_map": torch.arange(16)},
        ConfigError,
        ("expert_map is a Tensor", "ExpertMap(tensor)"),
    ),
    (
        "map, other L",
        lambda c: {"expert_map": ExpertMap.contiguous(16, 2, 0)},
        ShapeError,
        ("expert_map has 8 local experts", "L=4"),
    ),
    ("activation, a name", lambda c: {"activation": "silu"}, ConfigError, ("activation is a str", "SwiGLUOAI")),
    ("path, a name", lambda c: {"path": "bf16"}, ConfigError, ("path is 'bf16'", "epfuse.Path: Path.AUTO")),
    ("combine, a name", lambda c: {"combine": "atomic"}, ConfigError, ("combine is 'atomic'", "epfuse.Combine: ")),
    ("out, wrong shape", lambda c: {"out": c.hidden[:3].clone()}, ShapeError, ("out has shape (3, 64)", "(37, 64)")),
    ("out, wrong dtype", lambda c: {"out": c.hidden.float()}, DtypeError, ("out has dtype", "float32", "bfloat16")),
    ("out is hidden", lambda c: {"out": c.hidden}, LayoutError, ("out shares memory with hidden", "its own")),
]


@pytest.mark.parametrize(("change", "kind", "words"), [bad[1:] for bad in BAD_CALLS], ids=[bad[0] for bad in BAD_CALLS])
def test_bad_call(change: Change, kind: type[EpfuseError], words: tuple[str, ...]) -> None:
    case = make_case(CPU)
    with pytest.raises(kind) as caught:
        call(case, **change(case))
    for word in words:
        assert word in str(caught.value)


def test_partly_overlapping_out_is_refused() -> None:
    case = make_case(CPU)
    storage = torch.zeros(38, 64, dtype=torch.bfloat16)
    with pytest.raises(LayoutError, match="out shares memory"):
        call(case, hidden=storage[:37], out=storage[1:])


def test_more_routes_than_route_ids() -> None:
    """Checked before anything is computed: the inputs take no memory."""
    tokens = 2**29
    meta = torch.device("meta")
    weights = ExpertWeights.bf16(
        torch.empty(4, 96, 64, dtype=torch.bfloat16, device=meta),
        torch.empty(4, 64, 48, dtype=torch.bfloat16, device=meta),
    )
    with pytest.raises(ShapeError, match=r"T\*K is 2147483648; it must stay below 2\*\*31"):
        fused_experts(
            torch.empty(tokens, 64, dtype=torch.bfloat16, device=meta),
            weights,
            torch.empty(tokens, 4, device=meta),
            torch.empty(tokens, 4, dtype=torch.int64, device=meta),
            ExpertMap.contiguous(16, 4, 0),
        )


def test_a_path_that_the_device_lacks_names_those_that_it_has() -> None:
    with pytest.raises(
        UnsupportedTarget, match=r"'w8a8' has no kernel for cpu with weights in dense; it can run bf16, reference"
    ):
        call(make_case(CPU), path=Path.W8A8)


@pytest.mark.parametrize("path", [Path.AUTO, Path.REFERENCE, Path.BF16, Path.W8A16])
def test_a_sum_by_atomics_is_refused_where_there_is_none(path: Path) -> None:
    with pytest.raises(UnsupportedTarget, match="cpu with weights in dense, combine 'atomic'; it can run nothing so"):
        call(make_case(CPU), path=path, combine=Combine.ATOMIC)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp8_weights_on_the_reference_path(dtype: torch.dtype) -> None:
    case = make_case(CPU, dtype=dtype, intermediate=64)
    packed = ExpertWeights.quantize(case.weights)
    stacks = packed.mxfp8_experts
    exact = ExpertWeights.dense(stacks.w13.dequantize(torch.float32), stacks.w2.dequantize(torch.float32))
    want = call(case, hidden=case.hidden.float(), weights=exact)
    assert snr_db(call(case, weights=packed), want) > (110 if dtype == torch.float32 else 44)


def test_block_fp8_weights_on_the_reference_path() -> None:
    case = make_case(CPU, intermediate=64)
    stacks = ExpertWeights.quantize(case.weights).mxfp8_experts
    block = ExpertWeights.block_fp8(stacks.w13.values, stacks.w13.scales, stacks.w2.values, stacks.w2.scales)
    assert snr_db(call(case, weights=block), call(case, weights=ExpertWeights.quantize(case.weights))) > 44


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("limit", -7.0),
        ("limit", 0.0),
        ("limit", float("nan")),
        ("limit", "7"),
        ("alpha", float("inf")),
        ("beta", None),
        ("alpha", True),
    ],
)
def test_bad_activation(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(SwiGLUOAI(), **{field: value})
    assert f"SwiGLUOAI.{field} is {value!r}; it must be" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden", 0),
        ("experts", -1),
        ("top_k", 0),
        ("top_k", True),
        ("hidden", 10**400),
        ("local_experts", 17),
        ("intermediate", 1.5),
    ],
)
def test_bad_layer_shape(field: str, value: object) -> None:
    shape = LayerShape(hidden=64, intermediate=48, experts=16, local_experts=4, top_k=4)
    with pytest.raises(ConfigError, match=f"LayerShape.{field} is {shown(value)}"):
        replace(shape, **{field: value})


def test_public_names_resolve() -> None:
    for name in epfuse.__all__:
        assert getattr(epfuse, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'fused_expert'"):
        _ = epfuse.fused_expert
