"""Whatever is handed to the layer and its constructors: an EpfuseError that says what, or the right numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from epfuse import (
    Combine,
    EpfuseError,
    ExpertMap,
    ExpertWeights,
    LayerShape,
    Path,
    Scratch,
    SwiGLUOAI,
    Target,
    fused_experts,
    scratch_size,
)
from epfuse.errors import ConfigError, ExpertMapError, LayoutError
from epfuse.families.family import CallKind
from epfuse.numerics.e8m0 import ScaleRounding
from epfuse.numerics.mxfp8 import MXFP8, decode, encode
from epfuse.policy import decide
from epfuse.reference import run_reference
from epfuse.weights.block_fp8 import BlockFP8
from epfuse.weights.dense import DenseExperts
from epfuse.weights.mxfp8 import MXFP8Experts

TOKENS, TOP_K, HIDDEN, INTERMEDIATE, EXPERTS = 3, 2, 32, 32, 4

few_examples = settings(deadline=None, max_examples=100)
Tensors = dict[str, torch.Tensor]


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """A call that is right, and what weights are made from."""
    rng = torch.Generator().manual_seed(seed)
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=rng) / 4
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=rng) / 4
    a, b = MXFP8.quantize(w13), MXFP8.quantize(w2)
    return {
        "hidden": torch.randn(TOKENS, HIDDEN, generator=rng).to(dtype),
        "topk_weights": torch.rand(TOKENS, TOP_K, generator=rng),
        "topk_ids": torch.randint(-1, EXPERTS + 1, (TOKENS, TOP_K), generator=rng),
        "w13": w13.to(dtype),
        "w2": w2.to(dtype),
        "values13": a.values,
        "scales13": a.scales,
        "values2": b.values,
        "scales2": b.scales,
        "map": torch.arange(EXPERTS),
        "out": torch.zeros(TOKENS, HIDDEN, dtype=dtype),
    }


def fake(tensor: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(tensor)


def nested(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([part.float() for part in tensor.reshape(-1, 1)])


def jagged(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([part.float() for part in tensor.reshape(-1, 1)], layout=torch.jagged)


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """As large as one number, so that its strides are contiguous."""
    return torch.complex(torch.zeros(1, 1), torch.ones(1, 1)).conj().imag


BENT: dict[str, Callable[[torch.Tensor], object]] = {
    "none": lambda t: None,
    "list": lambda t: [[0.0]],
    "number": lambda t: 3.5,
    "array": lambda t: numpy.zeros(tuple(t.shape)),
    "string": lambda t: "hidden",
    "sparse": lambda t: t.float().to_sparse(),
    "csr": lambda t: torch.eye(8).to_sparse_csr(),
    "csc": lambda t: torch.eye(8).to_sparse_csc(),
    "bsr": lambda t: torch.eye(8).to_sparse_bsr((2, 2)),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "nested": nested,
    "jagged": jagged,
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "complex": lambda t: t.float().to(torch.complex64),
    "conjugate": lambda t: t.float().to(torch.complex64).conj(),
    "negated": negated,
    "meta": lambda t: t.to("meta"),
    "fake": fake,
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "int8": lambda t: t.float().to(torch.int8),
    "uint16": lambda t: t.float().abs().to(torch.uint16),
    "bool": lambda t: t.float() > 0,
    "fnuz": lambda t: t.float().to(torch.float8_e4m3fnuz),
    "e5m2": lambda t: t.float().to(torch.float8_e5m2),
    "scalar": lambda t: t.reshape(-1)[0],
    "flat": lambda t: t.reshape(-1),
    "deep": lambda t: t[None],
    "empty": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "narrow": lambda t: t[..., : max(1, t.shape[-1] // 2)].contiguous(),
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "turned": lambda t: t.transpose(0, -1),
    "expanded": lambda t: t[:1].expand(t.shape),
    "grad": lambda t: t.float().requires_grad_(),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "masked": lambda t: torch.masked.masked_tensor(t.float(), torch.ones(t.shape, dtype=torch.bool)),
}
NUMBERS = st.sampled_from(
    [
        *(
            0,
            1,
            2,
            3,
            -1,
            7,
            2**31 - 1,
            2**31,
            2**63,
            -(10**400),
            10**400,
            True,
            False,
            1.0,
            2.5,
            -0.0,
            1e-60,
            1e39,
            1e308,
        ),
        *(float("nan"), float("inf"), float("-inf"), "1", b"1", None, 1j, (1,), [], {}, object(), torch.tensor(1)),
        *(numpy.int64(3), numpy.uint8(2), numpy.float32(1.5), numpy.float64("nan"), numpy.bool_(True), numpy.array(1)),
        *(torch.float32, Path.BF16, ScaleRounding.CEIL, torch.nn.Parameter(torch.ones(1))),
    ]
)
ENUMS = st.sampled_from([*Path, *Combine, *Target, *ScaleRounding, "bf16", "atomic", None, 0, True, object()])


def bend(data: st.DataObject, given: dict[str, Any], most: int = 2) -> dict[str, Any]:
    """Some of the tensors replaced by what they must not be."""
    bent = dict(given)
    for name in data.draw(st.lists(st.sampled_from(sorted(given)), max_size=most, unique=True)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                bent[name] = BENT[data.draw(st.sampled_from(sorted(BENT)))](given[name])
            except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
                continue  # torch makes no such tensor of this one
    return bent


def weights_of(kind: str, t: dict[str, Any]) -> ExpertWeights:
    parts = (t["values13"], t["scales13"], t["values2"], t["scales2"])
    if kind == "dense":
        return ExpertWeights.dense(t["w13"], t["w2"])
    if kind == "bf16":
        return ExpertWeights.bf16(t["w13"], t["w2"])
    if kind == "quantize":
        return ExpertWeights.quantize(ExpertWeights.dense(t["w13"], t["w2"]))
    return {"mxfp8": ExpertWeights.mxfp8, "hybrid": ExpertWeights.hybrid, "block_fp8": ExpertWeights.block_fp8}[kind](
        *parts
    )


KINDS = ("dense", "bf16", "quantize", "mxfp8", "hybrid", "block_fp8")


@few_examples
@given(st.data())
def test_calls(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    dtype = (
        torch.bfloat16 if kind in ("bf16", "hybrid") else data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    )
    t = bend(data, tensors(dtype, data.draw(st.integers(0, 3))))
    options: dict[str, Any] = {}
    if data.draw(st.booleans()):
        options["out"] = t["out"]
    if data.draw(st.booleans()):
        options["path"] = data.draw(st.sampled_from([Path.AUTO, Path.REFERENCE]) | ENUMS)
    if data.draw(st.booleans()):
        options["combine"] = data.draw(st.just(Combine.DETERMINISTIC) | ENUMS)
    if data.draw(st.booleans()):
        options["activation"] = data.draw(st.sampled_from([SwiGLUOAI(), SwiGLUOAI(1, 0, 10), None, "silu", SwiGLUOAI]))
    try:
        weights, expert_map = weights_of(kind, t), ExpertMap(t["map"])
        if data.draw(st.booleans()):
            options["scratch"] = data.draw(st.sampled_from([None, "memory", (t["out"], t["out"])])) or Scratch(
                t["out"], t["hidden"]
            )
        got = fused_experts(t["hidden"], weights, t["topk_weights"], t["topk_ids"], expert_map, **options)
    except EpfuseError:
        return
    activation = options.get("activation") or SwiGLUOAI()
    exact = run_reference(t["hidden"], weights, t["topk_weights"], t["topk_ids"], expert_map, activation, torch.float64)
    tolerance = 1e-5 if t["hidden"].dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max() + 1e-30))


CONSTRUCTORS: dict[str, tuple[int, Callable[..., object]]] = {
    "contiguous": (3, ExpertMap.contiguous),
    "contiguous on": (4, ExpertMap.contiguous),
    "all_local": (1, ExpertMap.all_local),
    "activation": (3, SwiGLUOAI),
    "shape": (5, LayerShape),
    "map": (1, ExpertMap),
    "scratch": (2, Scratch),
    "formats": (1, ExpertWeights),
    "projections": (2, lambda x, y: ExpertWeights((x, y))),
    "dense": (2, DenseExperts),
    "mxfp8": (2, MXFP8Experts),
    "of path": (4, lambda *x: scratch_size(Path.BF16, *x)),
    "decide": (1, lambda x: decide(CallKind(Path.AUTO, Target.GFX950, LayerShape(32, 32, 4, 2, 2)), x)),
}


@few_examples
@given(st.sampled_from(sorted(CONSTRUCTORS)), st.data())
def test_constructors_of_numbers(name: str, data: st.DataObject) -> None:
    count, make = CONSTRUCTORS[name]
    with suppress(EpfuseError):
        make(*(data.draw(NUMBERS) for _ in range(count)))


@few_examples
@given(st.data())
def test_constructors_of_tensors(data: st.DataObject) -> None:
    t = bend(data, tensors(), most=3)
    options = {"rounding": data.draw(ENUMS)} if data.draw(st.booleans()) else {}
    calls: list[Callable[[], object]] = [
        lambda: ExpertMap(t["map"]),
        lambda: Scratch(t["out"], t["hidden"]),
        lambda: MXFP8(t["values13"], t["scales13"]).dequantize(),
        lambda: MXFP8.quantize(t["w13"], **options),
        lambda: encode(t["w13"], **options),
        lambda: decode(
            t["values13"], t["scales13"], data.draw(st.sampled_from([torch.float32, torch.int8, None, "x"]))
        ),
        lambda: BlockFP8.quantize(data.draw(st.sampled_from([t["w13"], MXFP8(t["values13"], t["scales13"])]))),
        lambda: BlockFP8(t["values13"], t["w2"]),
        lambda: ExpertWeights.quantize(t["w13"]),
        lambda: weights_of(data.draw(st.sampled_from(KINDS)), t).prepare(
            data.draw(st.sampled_from([*Target, "sm_90", 1])), data.draw(st.sampled_from([*Path, "w8a8"]))
        ),
    ]
    with suppress(EpfuseError):
        data.draw(st.sampled_from(calls))()


@pytest.mark.parametrize("name", ["hidden", "topk_weights", "topk_ids", "out"])
@pytest.mark.parametrize("how", ["csr", "nested", "jagged", "fake", "meta", "sparse", "complex", "quantised", "masked"])
def test_what_is_no_plain_tensor_is_named(name: str, how: str) -> None:
    t = tensors()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t[name] = BENT[how](t[name])
    weights, expert_map = ExpertWeights.dense(t["w13"], t["w2"]), ExpertMap(t["map"])
    with pytest.raises(EpfuseError, match=f"^{name} "):
        fused_experts(t["hidden"], weights, t["topk_weights"], t["topk_ids"], expert_map, out=t["out"])


def test_the_ones_that_were_foreign() -> None:
    with pytest.raises(ConfigError, match=r"scratch\.y is a NoneType; it must be a torch\.Tensor"):
        Scratch(None, None)
    with pytest.raises(ExpertMapError, match="has no entries to check"):
        ExpertMap(torch.empty(2, dtype=torch.int32, device="meta"))
    t = tensors()
    weights, expert_map, csr = ExpertWeights.dense(t["w13"], t["w2"]), ExpertMap(t["map"]), t["hidden"].to_sparse_csr()
    with pytest.raises(LayoutError, match="hidden is a sparse_csr tensor"):
        fused_experts(csr, weights, t["topk_weights"], t["topk_ids"], expert_map)
