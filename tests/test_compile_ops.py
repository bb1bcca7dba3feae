from __future__ import annotations

import gc
import io
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from epfuse import Combine, ExpertMap, ExpertWeights, Path, Scratch, SwiGLUOAI, Target, fused_experts, silu_gate
from epfuse.compile_ops import put_together, take_apart
from epfuse.config import LayerShape, WeightFormat
from epfuse.errors import ConfigError
from epfuse.parallel.group import EPGroup

E, L, K, H = 8, 4, 2, 64
MAP = ExpertMap.contiguous(E, 2, 1)


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def matrices(intermediate: int = 48, hidden: int = H) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    w13 = torch.randn(L, 2 * intermediate, hidden, generator=g) / hidden**0.5
    w2 = torch.randn(L, hidden, intermediate, generator=g) / intermediate**0.5
    return w13.bfloat16(), w2.bfloat16()


def rows(tokens: int, hidden: int = H) -> torch.Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens)).bfloat16()


class Block(nn.Module):
    """A router, the layer and a residual."""

    def __init__(self, weights: ExpertWeights, activation: SwiGLUOAI | None = None) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, dtype=torch.bfloat16)
        self.weights, self.activation = weights, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, ids = self.router(x).float().softmax(-1).topk(K)
        return x + fused_experts(x, self.weights, weight, ids, MAP, activation=self.activation)


class Counting:
    """A backend that counts graphs and the layer's operators in them."""

    def __init__(self, backend: str) -> None:
        self.graphs = self.layers = 0
        self.backend = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs += 1
        self.layers += layers_in(graph)
        return self.backend(graph, inputs)


def layers_in(graph: torch.fx.GraphModule) -> int:
    operator = torch.ops.epfuse.fused_experts
    return sum(node.target in (operator, operator.default) for node in graph.graph.nodes)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_traces_one_graph_for_all_numbers_of_tokens(backend: str) -> None:
    model, counting = Block(ExpertWeights.bf16(*matrices())), Counting(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for tokens in (5, 3, 64):
        x = rows(tokens)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), model(x))
    assert (counting.graphs, counting.layers) == (1, 1)


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_export_makes_a_program_that_can_be_saved(strict: bool) -> None:
    model = Block(ExpertWeights.mxfp8(*quantized()), silu_gate())  # whose limit is infinite
    program = torch.export.export(model, (rows(5),), dynamic_shapes=({0: torch.export.Dim("T")},), strict=strict)
    assert layers_in(program.graph_module) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    del program
    file.seek(0)
    loaded = torch.export.load(file).module()
    for tokens in (1, 5, 9):
        assert torch.equal(loaded(rows(tokens)), model(rows(tokens)))


@torch.no_grad()
def test_compile_and_export_trace_a_replaced_experts_module() -> None:
    pytest.importorskip("transformers")
    from epfuse.integrations.transformers import EPExperts

    model = EPExperts(ExpertWeights.bf16(*matrices()), MAP, SwiGLUOAI(), EPGroup.single())
    call = (rows(6), torch.arange(12).view(6, 2) % E, torch.rand(6, 2))
    expected = model(*call)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(*call), expected)
    program = torch.export.export(model, call)
    assert layers_in(program.graph_module) == 1
    assert set(program.state_dict) == {"gate_up_proj", "down_proj"}  # its weights are the program's parameters
    assert torch.equal(program.module()(*call), expected)


def quantized() -> tuple[torch.Tensor, ...]:
    found = ExpertWeights.quantize(ExpertWeights.dense(*matrices(64))).mxfp8_experts
    assert found is not None
    return found.w13.values, found.w13.scales, found.w2.values, found.w2.scales


FORMATS = {
    "float32": lambda: ExpertWeights.dense(*(w.float() for w in matrices(64))),
    "mxfp8": lambda: ExpertWeights.mxfp8(*quantized()),
    "hybrid": lambda: ExpertWeights.hybrid(*quantized()),
    "block_fp8": lambda: ExpertWeights.block_fp8(*quantized()),
    "fragment": lambda: ExpertWeights.mxfp8(*quantized()).prepare(Target.SM90),
    "row_fp8": lambda: ExpertWeights.mxfp8(*quantized()).prepare(Target.SM90, Path.W8A8),
    "mxfp8_fnuz": lambda: ExpertWeights.mxfp8(*quantized()).prepare(Target.GFX942),
    "block_fp8_fnuz": lambda: ExpertWeights.block_fp8(*quantized()).prepare(Target.GFX942),
}


@pytest.mark.parametrize("form", WeightFormat)
def test_every_format_can_be_taken_apart_and_put_together(form: WeightFormat) -> None:
    weights = ExpertWeights.without_data(form, LayerShape(H, 64, E, L, K))
    names, tensors = take_apart(weights)
    again = put_together(names, tensors, H, 64)
    assert list(again.kept) == [form]
    assert [(t.shape, t.dtype) for _, t in again.kept[form].tensors()] == [(t.shape, t.dtype) for t in tensors]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMATS)
def test_operator_takes_every_format(form: str) -> None:
    weights = FORMATS[form]()
    names, tensors = take_apart(weights)
    again = put_together(names, tensors, H, 64)
    assert again.kept.keys() == weights.kept.keys()
    assert again.spans() == weights.spans()  # the same memory
    x = rows(3).to(weights.activation_dtypes[0])
    routes = torch.rand(3, K), torch.tensor([[4, 7], [-1, 5], [0, 4]])
    slots, layer = MAP.on(x.device), [1.0, 0.5, 3.0]
    call = (x, tensors, names, L, 64, *routes, slots, "swiglu_oai", layer, "reference", "deterministic")
    expected = fused_experts(x, weights, *routes, MAP, activation=SwiGLUOAI(*layer), path=Path.REFERENCE)
    assert torch.equal(torch.ops.epfuse.fused_experts(*call), expected)
    torch.library.opcheck(torch.ops.epfuse.fused_experts, call, test_utils="test_faketensor")
    if form == "float32":  # torch can't multiply FP8 by a number, as its own check of the schema does
        torch.library.opcheck(torch.ops.epfuse.fused_experts, call, test_utils="test_schema")


@pytest.mark.parametrize(("formats", "tensors"), [("dense", 1), ("block_fp8", 0), ("tomorrows", 9)])
def test_a_graph_that_describes_no_layer_is_refused(formats: str, tensors: int) -> None:
    with pytest.raises(ConfigError, match="tensors left"):
        put_together(formats, [torch.zeros(1)] * tensors, H, 48)


@torch.no_grad()
def test_out_is_written_and_scratch_is_not_needed() -> None:
    weights, ids = ExpertWeights.bf16(*matrices()), torch.tensor([[4, 7], [5, 0]])
    scratch = Scratch(torch.empty(0, dtype=torch.bfloat16), torch.empty(0, dtype=torch.bfloat16))

    def call(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return fused_experts(x, weights, torch.ones(2, 2), ids, MAP, out=out, scratch=scratch)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    out = torch.full((2, H), torch.nan, dtype=torch.bfloat16)
    compiled(rows(2), out)
    assert torch.equal(out, fused_experts(rows(2), weights, torch.ones(2, 2), ids, MAP))
    with pytest.raises(Exception, match="out has shape"):
        compiled(rows(2), out.new_empty(1, H))


def test_gradients_are_refused_and_weights_may_require_them() -> None:
    w13, w2 = (w.requires_grad_() for w in matrices())
    weights, ids = ExpertWeights.bf16(w13, w2), torch.tensor([[4, 7], [5, 0]])

    def call(x: torch.Tensor) -> torch.Tensor:
        return fused_experts(x, weights, torch.ones(2, 2), ids, MAP)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    y = compiled(rows(2))
    assert not y.requires_grad
    assert torch.equal(y, call(rows(2)))
    with pytest.raises(Exception, match="requires grad"):
        compiled(rows(2).requires_grad_())


@torch.no_grad()
def test_nothing_keeps_the_weights() -> None:
    model = Block(ExpertWeights.bf16(*matrices()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(rows(3))
    assert model.weights.dense_experts is not None
    kept = [weakref.ref(model.weights.dense_experts.w13), weakref.ref(model.weights)]
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_an_eager_call_does_not_see_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("an eager call was traced")

    monkeypatch.setattr("epfuse.api.traced_experts", never)
    ids = torch.tensor([[4, 7]])
    fused_experts(rows(1), ExpertWeights.bf16(*matrices()), torch.ones(1, 2), ids, MAP)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("form", ["bf16", "w8a16", "atomic"])
def test_inductor_on_a_gpu(form: str, device: torch.device) -> None:
    wide = ExpertWeights.dense(*(w.to(device) for w in matrices(256, 256)))
    packed = ExpertWeights.quantize(wide)
    weights, path, combine = {
        "bf16": (wide, Path.BF16, Combine.DETERMINISTIC),
        "w8a16": (packed.prepare() if form == "w8a16" else packed, Path.W8A16, Combine.DETERMINISTIC),
        "atomic": (packed if torch.version.hip is None else packed.prepare(), Path.W8A8, Combine.ATOMIC),
    }[form]
    routes = torch.ones(8, 1, device=device), torch.arange(8, device=device).view(8, 1)  # a row a token: any order
    expert_map = ExpertMap.contiguous(E, 2, 1, device)

    def call(x: torch.Tensor) -> torch.Tensor:
        return 2 * fused_experts(x + 1, weights, *routes, expert_map, path=path, combine=combine)

    x = rows(8, 256).to(device)
    compiled = torch.compile(call, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):  # the third run replays a graph
        assert torch.equal(compiled(x).clone(), call(x))
