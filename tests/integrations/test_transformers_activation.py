"""What `activation_of` finds out about modules that nobody has seen: every one right, or refused with a reason."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from epfuse import ExpertMap, ExpertWeights, Path, SwiGLUOAI
from epfuse.config import silu_gate
from epfuse.errors import ConfigError, EpfuseError
from epfuse.integrations.transformers import activation_of, replace_experts
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.parallel.group import EPGroup
from epfuse.reference import run_reference
from epfuse.stages.tiles import GemmTile, LayerTiles
from tests.cases import Case, run_in_tiles

Gate = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
SILU = functional.silu


class Experts(nn.Module):
    """Experts as transformers writes them, with a gate of the test's."""

    def __init__(self, gate: Gate, **attributes: Any) -> None:
        super().__init__()
        self.gate = gate
        self.gate_up_proj = nn.Parameter(torch.randn(4, 2 * 6, 8))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 6))
        for name, value in attributes.items():
            setattr(self, name, value)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.gate(self, *gate_up.chunk(2, dim=-1))

    def expert(self, tokens: torch.Tensor, expert: int) -> torch.Tensor:
        rows = functional.linear(tokens, self.gate_up_proj[expert])
        return functional.linear(self._apply_gate(rows), self.down_proj[expert])

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for token, slot in (ids < self.gate_up_proj.shape[0]).nonzero().tolist():
            out[token] += self.expert(hidden[token], int(ids[token, slot])) * weights[token, slot]
        return out


def clamped(limit: float, act: Any = SILU) -> Gate:
    return lambda _, gate, up: act(gate.clamp(max=limit)) * up.clamp(-limit, limit)


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        (Experts(lambda _, gate, up: SILU(gate) * up), silu_gate()),
        (Experts(lambda _, gate, up: SILU(gate) * up, act_fn=nn.SiLU()), silu_gate()),
        (Experts(lambda _, gate, up: SILU(gate) * up, limit=None, swiglu_alpha=None), silu_gate()),
        (Experts(clamped(16.0), limit=16.0), SwiGLUOAI(1.0, 0.0, 16.0)),
        (Experts(clamped(9), swiglu_limit=9, limit=9), SwiGLUOAI(1.0, 0.0, 9)),
        (Experts(clamped(5.0), config=SimpleNamespace(swiglu_limit=5.0)), SwiGLUOAI(1.0, 0.0, 5.0)),
        (
            Experts(lambda m, g, u: g * torch.sigmoid(m.alpha * g) * (u + m.beta), alpha=2.0, beta=0.5),
            SwiGLUOAI(2.0, 0.5, math.inf),
        ),
    ],
)
def test_what_a_module_says_is_taken(experts: Any, expected: SwiGLUOAI) -> None:
    assert activation_of("layer", experts) == expected
    assert activation_of("layer", copy.deepcopy(experts).to("meta")) == expected
    with torch.autocast("cpu"):
        assert activation_of("layer", experts) == expected


@pytest.mark.parametrize(
    ("gate", "attributes"),
    [
        (clamped(20.0), {}),  # a limit that nothing names
        (clamped(1e20), {}),
        (clamped(16.0), {"limit": 10.0}),
        (lambda _, g, u: SILU(g) * u, {"limit": 10.0}),  # names a limit that its code does not apply
        (lambda _, g, u: SILU(g) * u, {"config": SimpleNamespace(swiglu_limit=1000.0)}),
        (lambda _, g, u: SILU(g.clamp(-10, 10)) * u.clamp(-10, 10), {"limit": 10.0}),  # gate clamped on both sides
        (lambda _, g, u: SILU(g.clamp(min=-30.0)) * u, {}),
        (lambda _, g, u: SILU(g.clamp(max=10.0)) * u, {"limit": 10.0}),  # up not clamped
        (lambda _, g, u: SILU(g) * u.clamp(-10, 10), {"limit": 10.0}),
        (lambda _, g, u: SILU(g.clamp(max=10.0)) * u.clamp(max=10.0), {"limit": 10.0}),
        (lambda _, g, u: SILU(g).clamp(max=10.0) * u.clamp(-10, 10), {"limit": 10.0}),  # clamped after silu
        (lambda _, g, u: (SILU(g) * u).clamp(-1e6, 1e6), {}),
        (lambda _, g, u: torch.tanh(SILU(g) / 1e5) * 1e5 * u, {}),  # a soft cap
        (lambda _, g, u: functional.gelu(g) * u, {}),
        (lambda _, g, u: SILU(g) * (u + 1), {}),
        (lambda _, g, u: SILU(u) * g, {}),
        (lambda _, g, u: SILU(g) * u, {"act_fn": nn.GELU()}),
        (lambda _, g, u: SILU(g) * u, {"act_fn": nn.ReLU6()}),
        (lambda _, g, u: SILU(g) * u, {"limit": "10"}),
        (lambda _, g, u: SILU(g) * u, {"limit": True}),
        (lambda _, g, u: SILU(g) * u, {"alpha": float("nan")}),
        (clamped(0.0), {"limit": 0.0}),
        (clamped(7.0), {"limit": 7.0, "swiglu_limit": 8.0}),
        (lambda m, g, u: m.nothing(g), {}),
    ],
)
def test_what_epfuse_can_not_say_is_refused(gate: Gate, attributes: dict[str, Any]) -> None:
    experts = Experts(gate, **attributes)
    with pytest.raises(ConfigError, match=r"layer \(Experts\)"):
        activation_of("layer", experts)


class Interleaved(Experts):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.gate(self, gate_up[..., ::2], gate_up[..., 1::2])


class WeightsBefore(Experts):
    """The router's weight multiplies the token, as in Llama-4."""

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for token, slot in (ids < 4).nonzero().tolist():
            out[token] += self.expert(hidden[token] * weights[token, slot], int(ids[token, slot]))
        return out


class Normed(Experts):
    def expert(self, tokens: torch.Tensor, expert: int) -> torch.Tensor:
        rows = super().expert(tokens, expert)
        return rows / (1 + rows.abs().amax())


class Doubled(Experts):
    def expert(self, tokens: torch.Tensor, expert: int) -> torch.Tensor:
        return super().expert(tokens, expert) * 2.5


class WithIdentity(Experts):
    """An id beyond the last expert's hands the token on, as LongCat's zero experts do."""

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden, ids, weights) + hidden * (weights * (ids >= 4)).sum(1, keepdim=True)


@pytest.mark.parametrize("kind", [Interleaved, WeightsBefore, Normed, Doubled, WithIdentity])
def test_a_forward_that_does_something_else_is_refused(kind: type[Experts]) -> None:
    with pytest.raises(ConfigError, match="does not know"):
        activation_of("layer", kind(lambda _, gate, up: SILU(gate) * up))


def test_fuzz_no_gate_is_taken_that_is_not_what_it_is_taken_for() -> None:
    """300 seeded gates, some right: what is taken gives the module's numbers where they are told apart."""
    generator = torch.Generator().manual_seed(0)

    def draw(*choices: float | None) -> float | None:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    taken = 0
    for _ in range(300):
        low, high = draw(None, None, -16.0, -40.0), draw(None, 10.0, 16.0, 1e5)
        below, above = draw(None, -10.0, -16.0), draw(None, 10.0, 16.0)
        alpha, beta = draw(1.0, 1.0, 1.702) or 1.0, draw(0.0, 0.0, 1.0) or 0.0
        said = {"limit": draw(None, high, 10.0)} | ({} if alpha == 1.0 else {"alpha": alpha, "beta": beta})

        def gate(_: Any, g: torch.Tensor, u: torch.Tensor, parts: Any = (low, high, below, above, alpha, beta)) -> Any:
            low, high, below, above, alpha, beta = parts
            g = g.clamp(low, high) if (low, high) != (None, None) else g
            u = u.clamp(below, above) if (below, above) != (None, None) else u
            return g * torch.sigmoid(alpha * g) * (u + beta)

        experts = Experts(gate, **said)
        try:
            found = activation_of("layer", experts)
        except EpfuseError:
            continue
        taken += 1
        assert (found.alpha, found.beta) == (alpha, beta)
        assert (low, below, above) == ((None, None, None) if high is None else (None, -high, high))
        assert found.limit == (math.inf if high is None else high)
    assert taken >= 3


TILE = GemmTile(block_n=64, block_k=128, group_m=0, num_warps=4, num_stages=2)
TILES = LayerTiles(16, TILE, TILE)


@torch.no_grad()
@pytest.mark.parametrize("path", [Path.REFERENCE, Path.BF16, Path.W8A16, Path.W8A8, Path.BLOCK_FP8])
def test_silu_with_a_limit_is_right_on_every_path(device: torch.device, path: Path) -> None:
    """DeepSeek-V4's activation, with accumulators far beyond the limit; every portable kernel."""
    generator = torch.Generator().manual_seed(0)
    experts = Experts(clamped(10.0), limit=10.0)
    stacks = [MXFP8.quantize(torch.randn(shape, generator=generator) * 0.5) for shape in ((4, 64, 64), (4, 64, 32))]
    for name, stack in zip(("gate_up_proj", "down_proj"), stacks, strict=True):
        setattr(experts, name, nn.Parameter(stack.dequantize(torch.float64)))
    hidden = (torch.randn(5, 64, generator=generator) * 6).bfloat16()
    ids = torch.rand(5, 4, generator=generator).topk(2).indices
    factors = torch.rand(5, 2, generator=generator)
    expected = experts(hidden.double(), ids, factors.double())
    unlimited = copy.deepcopy(experts)
    unlimited.gate = clamped(math.inf)
    wrong = unlimited(hidden.double(), ids, factors.double())

    bits = [part.to(device) for stack in stacks for part in (stack.values, stack.scales)]
    dense = ExpertWeights.bf16(*(stack.dequantize().to(device) for stack in stacks))
    weights = ExpertWeights.block_fp8(*bits) if path is Path.BLOCK_FP8 else ExpertWeights.mxfp8(*bits)
    weights = dense if path is Path.BF16 else weights
    form = next(iter(weights.kept))
    call = (hidden.to(device), weights, factors.to(device), ids.to(device), ExpertMap.all_local(4, device))
    activation = activation_of("layer", experts)
    out = torch.full_like(call[0], torch.nan)
    if path is Path.REFERENCE:
        out = run_reference(*call, activation)
    else:
        run_in_tiles(path, form, TILES, Case(*call), weights, out=out, activation=activation)
    error = (out.cpu().double() - expected).norm() / expected.norm()
    # FP8 rows and blocks: 4 % of accumulators of 24 is 1, a tenth of the limit
    assert float(error) < (0.15 if path in (Path.W8A8, Path.BLOCK_FP8) else 0.01)
    assert float((wrong - expected).norm() / expected.norm()) > 1.0


def test_a_replaced_model_keeps_the_limit() -> None:
    block: Any = nn.ModuleDict({"experts": Experts(clamped(16.0), limit=16.0)})
    assert replace_experts(block, EPGroup.single()).experts["experts"].activation == SwiGLUOAI(1.0, 0.0, 16.0)
