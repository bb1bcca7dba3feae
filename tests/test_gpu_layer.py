"""The whole layer on a GPU: MiniMax-M3's true size against float64, and CUDA graphs that see other routings."""

from __future__ import annotations

import pytest
import torch

from epfuse import Combine, ExpertMap, ExpertWeights, Path, Scratch, SwiGLUOAI, fused_experts, scratch_size
from epfuse.config import MINIMAX_M3_EP8 as M3
from epfuse.config import WeightFormat
from epfuse.reference import run_reference
from tests.cases import topk_ids_for

pytestmark = pytest.mark.gpu

TOKENS = (1, 3, 16, 64, 256, 300, 1024, 8192)


def mxfp8_tensors(device, local: int, hidden: int, intermediate: int) -> list[torch.Tensor]:
    """w13, w13_scale, w2, w2_scale: every code but NaN, scale bytes of real weights, a zero block and a byte 0."""
    g = torch.Generator(device).manual_seed(1)
    tensors = []
    for rows, columns in ((2 * intermediate, hidden), (hidden, intermediate)):
        codes = torch.randint(0, 120, (local, rows, columns), dtype=torch.uint8, device=device, generator=g)
        codes |= torch.randint(0, 2, codes.shape, dtype=torch.uint8, device=device, generator=g) * 128
        scales = torch.randint(112, 118, (local, rows, columns // 32), dtype=torch.uint8, device=device, generator=g)
        scales[:, 5, 0] = 0
        codes[:, 7, :32] = 0
        tensors += [codes.view(torch.float8_e4m3fn), scales]
    return tensors


def routing(device, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """topk_weights, topk_ids with at least one route of expert 0."""
    ids = topk_ids_for("uniform", tokens, M3.experts, M3.local_experts, M3.top_k, seed)
    ids[-1, 0] = 0
    g = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, M3.top_k, generator=g).to(device), ids.int().to(device)


PATHS = {
    "bf16": Path.BF16,
    "w8a16": Path.W8A16,
    "w8a16 portable": Path.W8A16,
    "w8a8": Path.W8A8,
    "w8a8 one scale a row": Path.W8A8,
}


class Layers:
    """M3's experts of one rank as a checkpoint has them (0.9 GB), and in one other format at a time (up to 1.8 GB).

    Many processes run these tests side by side.
    """

    def __init__(self, device: torch.device) -> None:
        self.rows = ExpertWeights.mxfp8(*mxfp8_tensors(device, M3.local_experts, M3.hidden, M3.intermediate))
        self._made: tuple[str, ExpertWeights] | None = None

    def __getitem__(self, name: str) -> tuple[Path, ExpertWeights]:
        if name in ("w8a16 portable", "w8a8"):
            return PATHS[name], self.rows
        if self._made is None or self._made[0] != name:
            self._made = None  # before the next one is made
            self._made = name, self._make(name)
        return PATHS[name], self._made[1]

    def _make(self, name: str) -> ExpertWeights:
        stacks = self.rows.kept[WeightFormat.MXFP8]
        if name == "bf16":
            return ExpertWeights.bf16(*(stack.dequantize(torch.bfloat16) for stack in (stacks.w13, stacks.w2)))
        tensors = (t.clone() for stack in (stacks.w13, stacks.w2) for t in (stack.values, stack.scales))
        return ExpertWeights.mxfp8(*tensors).prepare(path=PATHS[name])


@pytest.fixture(scope="module")
def m3():
    """M3's experts of one rank in the formats under test, and its map."""
    device = torch.device("cuda", 0)
    return Layers(device), ExpertMap.contiguous(M3.experts, M3.experts // M3.local_experts, 0, device)


def relative_error(out: torch.Tensor, oracle: torch.Tensor) -> float:
    return float((out.double() - oracle).norm() / oracle.norm())


LIMITS = {"bf16": 4e-3, "w8a16": 4e-3, "w8a16 portable": 4e-3, "w8a8": 5e-2, "w8a8 one scale a row": 5e-2}


@pytest.mark.parametrize("scale", [0.1, 2.5], ids=["small", "clamped"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_true_size(m3, tokens, scale):
    layers, slots = m3
    device = torch.device("cuda", 0)
    weights, ids = routing(device, tokens, tokens)
    hidden = (
        torch.randn(tokens, M3.hidden, device=device, generator=torch.Generator(device).manual_seed(5)) * scale
    ).bfloat16()
    oracle = run_reference(hidden, layers["w8a16 portable"][1], weights, ids, slots, SwiGLUOAI(), torch.float64)
    results = {}
    for name in PATHS:
        path, experts = layers[name]
        out = torch.full_like(hidden, float("nan"))
        fused_experts(hidden, experts, weights, ids, slots, path=path, out=out)
        results[name] = out
        assert relative_error(out, oracle) <= LIMITS[name], name
    atomic = fused_experts(hidden, layers["w8a8"][1], weights, ids, slots, path=Path.W8A8, combine=Combine.ATOMIC)
    assert relative_error(atomic, oracle) <= 1.5 * relative_error(results["w8a8"], oracle)


@pytest.mark.parametrize("name", ["bf16", "w8a16", "w8a8 one scale a row"])
@pytest.mark.parametrize("tokens", [24, 300, 2000, 8192])
def test_y_in_the_memory_of_out(m3, name, tokens):
    """Nothing is written to out while down still reads y there."""
    layers, slots = m3
    path, experts = layers[name]
    weights, ids = routing(torch.device("cuda", 0), tokens, tokens)
    hidden = torch.randn(tokens, M3.hidden, device=ids.device).bfloat16()
    expected = fused_experts(hidden, experts, weights, ids, slots, path=path)
    size = scratch_size(path, tokens, M3.top_k, M3.hidden, M3.intermediate)
    common = hidden.new_empty(max(size.y, hidden.numel()))
    scratch = Scratch(common[: size.y], hidden.new_empty(size.routed))
    for _ in range(5):
        common.fill_(float("nan"))
        out = common[: hidden.numel()].view_as(hidden)
        fused_experts(hidden, experts, weights, ids, slots, path=path, out=out, scratch=scratch)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("tokens", [1, 24, 300])
def test_a_graph_replays_with_other_routings(m3, name, tokens):
    layers, slots = m3
    path, experts = layers[name]
    device = torch.device("cuda", 0)
    weights, ids = routing(device, tokens, 0)
    hidden = torch.randn(tokens, M3.hidden, device=device).bfloat16()
    fused_experts(hidden, experts, weights, ids, slots, path=path)  # compiles, outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused_experts(hidden, experts, weights, ids, slots, path=path)
    kinds = ("uniform", "one_expert", "nothing_local", "duplicates", "padding_ids")
    for seed in range(20):
        other = topk_ids_for(kinds[seed % 5], tokens, M3.experts, M3.local_experts, M3.top_k, seed)
        ids.copy_(other)
        weights.copy_(torch.rand(tokens, M3.top_k))
        captured.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(
            captured, fused_experts(hidden, experts, weights, ids, slots, path=path), rtol=0, atol=0
        )
