"""On a GPU: planned calls give the bits of calls without a plan, eagerly, in a graph, on a stream, on new memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from epfuse import ExpertMap, ExpertWeights, Path, Scratch, fused_experts, launch_plan, scratch_size
from epfuse.numerics.mxfp8 import MXFP8

HIDDEN, INTERMEDIATE, EXPERTS, LOCAL, TOP_K = 512, 256, 16, 8, 4

pytestmark = pytest.mark.gpu


class Layer:
    """Random weights of one path, and calls of them."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        self.random = torch.Generator(device).manual_seed(26)
        self.expert_map = ExpertMap.contiguous(EXPERTS, EXPERTS // LOCAL, 1, device)
        self.weights = self.new_weights()

    def new_weights(self) -> ExpertWeights:
        sizes = ((LOCAL, 2 * INTERMEDIATE, HIDDEN), (LOCAL, HIDDEN, INTERMEDIATE))
        w13, w2 = (self.normal(*size) / size[2] ** 0.5 for size in sizes)
        if self.path is Path.BF16:
            return ExpertWeights.bf16(w13, w2)
        first, second = MXFP8.quantize(w13), MXFP8.quantize(w2)
        made = ExpertWeights.mxfp8(first.values, first.scales, second.values, second.scales)
        return made.prepare(path=self.path)

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.random, device=self.device).bfloat16()

    def operands(self, tokens: int) -> tuple[Any, ...]:
        factors, ids = torch.rand(tokens, EXPERTS, generator=self.random, device=self.device).topk(TOP_K)
        return self.normal(tokens, HIDDEN), self.weights, factors, ids, self.expert_map

    def brought(self, tokens: int, out_in_y: bool) -> dict[str, Any]:
        size = scratch_size(self.path, tokens, TOP_K, HIDDEN, INTERMEDIATE)
        rows = tokens * HIDDEN
        y, routed = (
            torch.full((n,), float("nan"), device=self.device).bfloat16() for n in (size.y + rows, size.routed)
        )
        out = y[:rows].view(tokens, HIDDEN) if out_in_y else torch.empty_like(y[:rows]).view(tokens, HIDDEN)
        return {"scratch": Scratch(y, routed), "out": out}


@pytest.fixture(params=[Path.W8A16, Path.W8A8, Path.BF16], ids=lambda path: path.value)
def layer(request: pytest.FixtureRequest, device: torch.device) -> Layer:
    return Layer(request.param, device)


def unplanned(layer: Layer, operands: tuple[Any, ...], **more: Any) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_plan, "can_plan", lambda call: False)
        return fused_experts(*operands, path=layer.path, **more).clone()


@pytest.mark.parametrize("tokens", [7, 500])
def test_planned_calls_have_the_bits_of_others(layer: Layer, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epfuse.api.PLANS", plans := launch_plan.Plans())
    for number in range(5):
        if number == 4:
            layer.weights = layer.new_weights()
        operands = layer.operands(tokens)
        wanted = unplanned(layer, operands)
        for more in ({}, layer.brought(tokens, out_in_y=False), layer.brought(tokens, out_in_y=True)):
            assert torch.equal(fused_experts(*operands, path=layer.path, **more), wanted), (number, list(more))
    assert None not in plans._plans.values()
    assert len(plans._plans) == (3 if torch.version.hip is None else 0)


def test_planned_calls_are_captured_and_replayed(layer: Layer) -> None:
    operands = layer.operands(7)
    for _ in range(3):
        fused_experts(*operands, path=layer.path)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_experts(*operands, path=layer.path)
    for _ in range(3):
        for operand, new in zip(operands, layer.operands(7), strict=True):
            if isinstance(operand, torch.Tensor):
                operand.copy_(new)
        graph.replay()
        assert torch.equal(out, unplanned(layer, operands))


@pytest.mark.two_gpus
@pytest.mark.parametrize("path", [Path.W8A16, Path.BF16], ids=lambda path: path.value)
def test_calls_run_on_the_device_of_their_tensors(path: Path) -> None:
    """Whichever is current, as torch's operators do."""
    layer = Layer(path, torch.device("cuda", 1))
    operands = layer.operands(7)
    with torch.cuda.device(1):
        wanted = unplanned(layer, operands)
    assert torch.cuda.current_device() == 0
    for _ in range(4):
        assert torch.equal(fused_experts(*operands, path=path), wanted)
    assert torch.cuda.current_device() == 0


def test_planned_calls_run_on_the_current_stream(layer: Layer) -> None:
    operands = layer.operands(7)
    wanted = unplanned(layer, operands)
    for _ in range(3):
        fused_experts(*operands, path=layer.path)
    stream = torch.cuda.Stream()
    hidden = operands[0].clone()
    operands[0].zero_()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        operands[0].copy_(hidden)  # what runs on another stream comes too early for it
        out = fused_experts(*operands, path=layer.path)
    stream.synchronize()
    assert torch.equal(out, wanted)
