"""Experts of every kind, with biases and without, on every family, against a plain loop in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from epfuse import (
    ExpertWeights,
    GELUTanh,
    LayerShape,
    Path,
    ReLU2,
    SoftcappedSwiGLU,
    SwiGLUOAI,
    Target,
    fused_experts,
    silu_gate,
)
from epfuse.compile_ops import put_together, take_apart
from epfuse.config import ACTIVATIONS, Activation, Bias, Combine, WeightFormat
from epfuse.errors import ConfigError, EpfuseError, ShapeError, UnsupportedTarget
from epfuse.families.family import CallKind
from epfuse.families.registry import FAMILIES, READABLE, serving
from epfuse.policy import decide
from epfuse.stages.tiles import GemmTile, LayerTiles
from epfuse.verify.suite import poisoned_memory
from tests.cases import Case, make_case, run_in_tiles, snr_db

KINDS: dict[str, tuple[Activation, Bias]] = {
    "gpt-oss": (SwiGLUOAI(), Bias.ADDED),
    "gelu": (GELUTanh(), Bias.NONE),
    "softcap": (SoftcappedSwiGLU(4.0, 3.0), Bias.NONE),
    "relu2": (ReLU2(), Bias.NONE),
    "relu2 with biases": (ReLU2(), Bias.ADDED),
}
TILE = GemmTile(block_n=32, block_k=32, group_m=0, num_warps=4, num_stages=2)
TILES = LayerTiles(16, TILE, TILE)
FP8_TILE = GemmTile(block_n=128, block_k=128, group_m=0, num_warps=4, num_stages=2)
FP8_TILES = LayerTiles(16, FP8_TILE, FP8_TILE)
FLOOR = {torch.bfloat16: 44.0, torch.float16: 62.0, torch.float32: 110.0}
FP8_FLOOR = 22.0
"""As in test_gemms and test_portable_fp8; relu2 doubles its input's relative error, which takes 6 dB off."""


def cap(x: torch.Tensor, most: float) -> torch.Tensor:
    return most * torch.tanh(x / most)


FORMULAS: dict[type[Activation], Callable[..., torch.Tensor]] = {
    SwiGLUOAI: lambda a, g, u: (
        g.clamp(max=a.limit) / (1 + torch.exp(-a.alpha * g.clamp(max=a.limit))) * (u.clamp(-a.limit, a.limit) + a.beta)
    ),
    GELUTanh: lambda a, g, u: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))) * u,
    SoftcappedSwiGLU: lambda a, g, u: cap(g, a.gate_cap) / (1 + torch.exp(-g)) * cap(u, a.up_cap),
    ReLU2: lambda a, x: torch.where(x > 0, x * x, 0 * x),
}


def layer(device: torch.device, kind: str, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> Case:
    """A case of a kind; its biases are as large as its products."""
    activation, bias = KINDS[kind]
    case = make_case(device, dtype=dtype, scale=2.0, **sizes)
    dense, g = case.weights.dense_experts, torch.Generator().manual_seed(7)
    w13 = dense.w13[:, : activation.inputs * case.weights.intermediate].contiguous()
    biases = {}
    if bias is Bias.ADDED:
        biases["gate_up_bias"] = torch.randn(*w13.shape[:2], generator=g).to(device)
        biases["down_bias"] = torch.randn(w13.shape[0], w13.shape[2], generator=g).to(device, torch.bfloat16)
    weights = ExpertWeights.dense(w13, dense.w2, **biases)
    return Case(case.hidden, weights, case.topk_weights, case.topk_ids, case.expert_map)


def wanted(case: Case, activation: Activation) -> torch.Tensor:
    """Token by token, route by route."""
    weights = case.weights
    experts = weights.reference_experts
    out = torch.zeros(case.hidden.shape, dtype=torch.float64, device=case.hidden.device)
    slots = case.expert_map.on(torch.device("cpu")).tolist()
    for (token, ids), factors in zip(enumerate(case.topk_ids.tolist()), case.topk_weights.tolist(), strict=True):
        for expert, factor in zip(ids, factors, strict=True):
            slot = slots[expert] if 0 <= expert < len(slots) else -1
            if slot < 0:
                continue
            matrices = [s[slot].double() if isinstance(s, torch.Tensor) else s.matrix(slot, torch.float64)
                        for s in (experts.w13, experts.w2)]  # fmt: skip
            projected = matrices[0] @ case.hidden[token].double()
            if weights.gate_up_bias is not None:
                projected = projected + weights.gate_up_bias[slot].double()
            row = FORMULAS[type(activation)](activation, *projected.chunk(activation.inputs))
            row = matrices[1] @ row
            if weights.down_bias is not None:
                row = row + weights.down_bias[slot].double()
            out[token] += factor * row
    return out


def floor(activation: Activation, dtype: torch.dtype) -> float:
    return FLOOR[dtype] - (6.0 if isinstance(activation, ReLU2) else 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "hidden", "intermediate"), [(torch.bfloat16, 64, 48), (torch.float32, 33, 17)], ids=["bf16", "fp32, odd"]
)
def test_dense_weights(device: torch.device, kind: str, dtype: torch.dtype, hidden: int, intermediate: int) -> None:
    """On the reference, on the CPU's products, and on the portable kernels."""
    activation, _ = KINDS[kind]
    case = layer(device, kind, dtype, tokens=9, hidden=hidden, intermediate=intermediate)
    want = wanted(case, activation)
    call = (case.hidden, case.weights, case.topk_weights, case.topk_ids, case.expert_map)
    with poisoned_memory():
        results = {path.value: fused_experts(*call, activation=activation, path=path)
                   for path in (Path.REFERENCE, Path.BF16)}  # fmt: skip
        results["portable"] = run_in_tiles(
            Path.BF16, WeightFormat.DENSE, TILES, case, case.weights, activation=activation
        )
    for name, result in results.items():
        assert snr_db(result, want) > floor(activation, dtype), name
    empty = want.abs().sum(1) == 0
    assert bool(empty.any())
    assert not results["portable"][empty].any()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_mxfp8(device: torch.device, kind: str) -> None:
    """On the CPU's products and on the portable kernels, with BF16 activations and with FP8 ones."""
    activation, bias = KINDS[kind]
    case = layer(device, kind, tokens=3, hidden=64, intermediate=96, experts=4, local=2)
    packed = ExpertWeights.quantize(case.weights)
    assert packed.bias is case.weights.bias
    case = Case(case.hidden, packed, case.topk_weights, case.topk_ids, case.expert_map)
    want = wanted(case, activation)
    with poisoned_memory():
        args = (case.hidden, packed, case.topk_weights, case.topk_ids, case.expert_map)
        results = [
            fused_experts(*args, activation=activation),
            run_in_tiles(Path.W8A16, WeightFormat.MXFP8, TILES, case, packed, activation=activation),
        ]
        rough = [
            run_in_tiles(Path.W8A8, WeightFormat.MXFP8, FP8_TILES, case, packed, combine, activation=activation)
            for combine in (Combine if bias is Bias.ADDED else [Combine.DETERMINISTIC])
        ]
    for result in results:
        assert snr_db(result, want) > floor(activation, torch.bfloat16)
    for result in rough:
        assert snr_db(result, want) > FP8_FLOOR - (6.0 if activation.inputs == 1 else 0.0)


def test_one_bias_is_enough(device: torch.device) -> None:
    for leave in ("gate_up_bias", "down_bias"):
        case = layer(device, "gpt-oss", tokens=5)
        given = {name: bias for name, bias in case.weights.biases if name != leave}
        weights = ExpertWeights(case.weights.formats, **given)
        case = Case(case.hidden, weights, case.topk_weights, case.topk_ids, case.expert_map)
        result = run_in_tiles(Path.BF16, WeightFormat.DENSE, TILES, case, weights)
        assert snr_db(result, wanted(case, SwiGLUOAI())) > FLOOR[torch.bfloat16]


def test_the_bias_of_down_counts_once_per_local_route_over_all_ranks(device: torch.device) -> None:
    """The sum over the ranks is the unsharded layer."""
    from epfuse import ExpertMap

    case = layer(device, "gpt-oss", tokens=13, experts=8, local=8)
    dense = case.weights.dense_experts
    total = torch.zeros_like(case.hidden, dtype=torch.float64)
    for rank in range(4):
        mine = slice(2 * rank, 2 * rank + 2)
        share = ExpertWeights.dense(
            dense.w13[mine].contiguous(),
            dense.w2[mine].contiguous(),
            gate_up_bias=case.weights.gate_up_bias[mine].contiguous(),
            down_bias=case.weights.down_bias[mine].contiguous(),
        )
        expert_map = ExpertMap.contiguous(8, 4, rank, device)
        total += fused_experts(case.hidden, share, case.topk_weights, case.topk_ids, expert_map).double()
    assert snr_db(total, wanted(case, SwiGLUOAI())) > FLOOR[torch.bfloat16] - 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_call_keeps_biases_and_kind(kind: str) -> None:
    case = layer(torch.device("cpu"), kind, tokens=3)
    formats, tensors = take_apart(case.weights)
    again = put_together(formats, tensors, case.weights.hidden, case.weights.intermediate)
    assert [name for name, _ in again.biases] == [name for name, _ in case.weights.biases]
    assert again.spans() == case.weights.spans()


def test_what_reads_a_layer_is_what_accepts_it() -> None:
    """Whatever the weights become by `prepare` on a GPU, some family serves them, and none that lacks their kind."""
    shape = LayerShape(hidden=256, intermediate=128, experts=8, local_experts=8, top_k=2)
    for target, kind, bias in itertools.product((Target.SM90, Target.GFX942, Target.GFX950), ACTIVATIONS, Bias):
        for path, forms in READABLE[target].items():
            for form in forms:
                for family in serving(CallKind(path, target, shape, frozenset({form}), activation=kind, bias=bias)):
                    assert bias in family.biases
                    assert family.computes(kind)
        decision = decide(CallKind(Path.BF16, target, shape, activation=kind, bias=bias), 64)
        assert decision.family in FAMILIES
        assert bias in decision.family.biases
        own = target is Target.SM90 and kind is SwiGLUOAI
        assert decision.family.name == ("sm90" if own else "portable")


@pytest.mark.parametrize("kind", ["relu2", "relu2 with biases"])
@pytest.mark.parametrize("path", [Path.AUTO, Path.W8A8])
def test_hopper_keeps_the_order_of_what_its_own_kernels_refuse(kind: str, path: Path) -> None:
    activation, bias = KINDS[kind]
    packed = ExpertWeights.quantize(layer(torch.device("cpu"), kind, hidden=64, intermediate=64).weights)
    assert packed.prepare(Target.SM90, path) is packed
    shape = LayerShape(hidden=64, intermediate=64, experts=16, local_experts=4, top_k=4)
    kind_of_call = CallKind(Path.W8A16, Target.SM90, shape, activation=type(activation), bias=bias)
    assert decide(replace(kind_of_call, formats=frozenset(packed.kept)), 8).family.name == "portable"
    with pytest.raises(UnsupportedTarget, match="ReLU2"):
        decide(kind_of_call.on(Path.W8A16, WeightFormat.FRAGMENT), 8)


@pytest.mark.parametrize("path", [Path.W8A16, Path.W8A8])
def test_hopper_has_its_own_order_of_weights_beside_biases(path: Path) -> None:
    weights = ExpertWeights.quantize(layer(torch.device("cpu"), "gpt-oss", hidden=64, intermediate=64).weights)
    packed = weights.prepare(Target.SM90, path)
    assert list(packed.kept) == [WeightFormat.FRAGMENT if path is Path.W8A16 else WeightFormat.ROW_FP8]
    assert packed.bias is Bias.ADDED
    shape = LayerShape(hidden=64, intermediate=64, experts=16, local_experts=4, top_k=4)
    for tokens, family in ((8, "sm90"), (4096, "sm90_packed")) if path is Path.W8A16 else ((8, "sm90_fp8"),):
        decision = decide(CallKind(path, Target.SM90, shape, frozenset(packed.kept), bias=Bias.ADDED), tokens)
        assert decision.family.name == family


HOPPER = {Path.BF16: FLOOR[torch.bfloat16], Path.W8A16: FLOOR[torch.bfloat16], Path.W8A8: FP8_FLOOR}


@pytest.mark.gpu
@pytest.mark.parametrize("path", HOPPER)
@pytest.mark.parametrize(("tokens", "routing"), [(3, "uniform"), (64, "duplicates"), (257, "padding_ids"),
                                                 (700, "uniform"), (300, "one_expert")])  # fmt: skip
def test_hopper_serves_gpt_oss(device: torch.device, path: Path, tokens: int, routing: str) -> None:
    """As the policy runs it: few rows and many, experts without any, ids of -1; ranks add up."""
    case = layer(device, "gpt-oss", tokens=tokens, hidden=256, intermediate=384, routing=routing)
    weights = case.weights if path is Path.BF16 else ExpertWeights.quantize(case.weights)
    want = wanted(Case(case.hidden, weights, case.topk_weights, case.topk_ids, case.expert_map), SwiGLUOAI())
    weights = weights.prepare(path=path)
    shape = LayerShape(hidden=256, intermediate=384, experts=16, local_experts=4, top_k=4)
    decision = decide(CallKind(path, Target.SM90, shape, frozenset(weights.kept), bias=Bias.ADDED), tokens)
    assert decision.family.name.startswith("sm90")
    with poisoned_memory():
        result = fused_experts(case.hidden, weights, case.topk_weights, case.topk_ids, case.expert_map, path=path)
    assert snr_db(result, want) > HOPPER[path]
    empty = want.abs().sum(1) == 0
    assert not result[empty].any()


@pytest.mark.gpu
@pytest.mark.parametrize("path", HOPPER)
def test_hopper_counts_the_bias_of_down_once_per_local_route(device: torch.device, path: Path) -> None:
    """Four ranks' results add up to the unsharded layer, at few rows and at many."""
    from epfuse import ExpertMap

    for tokens in (13, 600):
        case = layer(device, "gpt-oss", tokens=tokens, hidden=256, intermediate=128, experts=8, local=8)
        dense, total = case.weights.dense_experts, torch.zeros_like(case.hidden, dtype=torch.float64)
        for rank in range(4):
            mine = slice(2 * rank, 2 * rank + 2)
            biases = {name: bias[mine].contiguous() for name, bias in case.weights.biases}
            share = ExpertWeights.dense(dense.w13[mine].contiguous(), dense.w2[mine].contiguous(), **biases)
            share = share if path is Path.BF16 else ExpertWeights.quantize(share).prepare(path=path)
            expert_map = ExpertMap.contiguous(8, 4, rank, device)
            total += fused_experts(case.hidden, share, case.topk_weights, case.topk_ids, expert_map, path=path).double()
        weights = case.weights if path is Path.BF16 else ExpertWeights.quantize(case.weights)
        want = wanted(Case(case.hidden, weights, case.topk_weights, case.topk_ids, case.expert_map), SwiGLUOAI())
        assert snr_db(total, want) > HOPPER[path] - 3


def test_a_gate_that_is_not_there_is_refused(device: torch.device) -> None:
    case, gated = layer(device, "relu2"), make_case(device)
    for one, activation in ((case, silu_gate()), (case, GELUTanh()), (gated, ReLU2())):
        with pytest.raises(ShapeError, match="wants w13 with"):
            fused_experts(one.hidden, one.weights, one.topk_weights, one.topk_ids, one.expert_map,
                          activation=activation)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gate_up_bias", torch.zeros(4, 48)),
        ("gate_up_bias", torch.zeros(4, 96, dtype=torch.float64)),
        ("gate_up_bias", torch.zeros(4, 192)[:, ::2]),
        ("gate_up_bias", torch.zeros(4, 96, device="meta")),
        ("gate_up_bias", [0.0]),
        ("down_bias", torch.zeros(64)),
        ("down_bias", torch.zeros(3, 64)),
        ("down_bias", torch.zeros(4, 64, dtype=torch.int32)),
    ],
)
def test_a_bias_that_does_not_fit_is_refused_by_name(name: str, value: object) -> None:
    dense = make_case(torch.device("cpu")).weights.dense_experts
    with pytest.raises(EpfuseError, match=name):
        ExpertWeights.dense(dense.w13, dense.w2, **{name: value})


def test_a_result_over_a_bias_is_refused(device: torch.device) -> None:
    case = layer(device, "gpt-oss", torch.float32, tokens=2)
    out = case.weights.down_bias[:2]
    with pytest.raises(EpfuseError, match="out shares memory with down_bias"):
        fused_experts(case.hidden, case.weights, case.topk_weights, case.topk_ids, case.expert_map, out=out)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_a_cap_must_bound(bad: float) -> None:
    with pytest.raises(ConfigError, match=r"SoftcappedSwiGLU\.up_cap"):
        SoftcappedSwiGLU(1.0, bad)
