"""A module's later calls on a CPU go a short way: the same bits, and the long way where something changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from epfuse.config import Path
from epfuse.errors import ConfigError
from epfuse.integrations.transformers import direct, forget, interface, register
from tests.integrations.test_transformers_families import experts_of

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register()
    yield
    forget()


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which way each call goes from now on."""
    found: list[str] = []
    right, directly = interface.fused_experts, direct.run_experts
    monkeypatch.setattr(interface, "fused_experts", lambda *a, **k: found.append("long") or right(*a, **k))
    monkeypatch.setattr(direct, "run_experts", lambda *a: found.append("short") or directly(*a))
    return found


def layer(which: str = "qwen3_moe.Qwen3MoeExperts", dtype: torch.dtype = torch.bfloat16) -> Any:
    experts = experts_of(which, moe_intermediate_size=8).to(dtype)
    experts.config._experts_implementation = "epfuse"
    return experts


def batch(tokens: int, dtype: torch.dtype = torch.bfloat16) -> Operands:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 8, generator=generator).to(dtype)
    ids = torch.rand(tokens, 5, generator=generator).topk(2).indices
    return hidden, ids, torch.rand(tokens, 2, generator=generator).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("which", ["qwen3_moe.Qwen3MoeExperts", "nemotron_h.NemotronHExperts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_both_ways_have_the_same_bits(which: str, dtype: torch.dtype, tokens: int, ways: list[str]) -> None:
    experts, call = layer(which, dtype), batch(tokens, dtype)
    assert torch.equal(experts(*call), experts(*call))
    with torch.inference_mode():
        experts(*call)
    assert ways == ["long", "short", "short"]


@torch.no_grad()
def test_what_autocast_or_a_transposed_router_left_goes_the_long_way_or_is_made_plain(ways: list[str]) -> None:
    experts, (hidden, ids, factors) = layer(), batch(6)
    want = experts(hidden, ids, factors)
    assert torch.equal(experts(hidden.T.contiguous().T, ids.T.contiguous().T, factors.T.contiguous().T), want)
    assert torch.equal(experts(hidden, ids.int(), factors.float()), want)
    assert torch.equal(experts(hidden.float(), ids, factors), want.float())
    assert experts(hidden[:0], ids[:0], factors[:0]).shape == (0, 8)
    assert ways == ["long", "short", "short", "long", "long"]


def _doubled(experts: Any) -> None:
    experts.down_proj.mul_(2)


def _another(experts: Any) -> None:
    experts.down_proj = nn.Parameter(experts.down_proj * 2, requires_grad=False)


def _no_parameter(experts: Any) -> None:
    other = experts.down_proj * 2
    del experts.down_proj
    experts.register_buffer("down_proj", other)


@torch.no_grad()
@pytest.mark.parametrize(("change", "way"), [(_doubled, "short"), (_another, "short"), (_no_parameter, "long")])
def test_tensors_that_change_are_read(change: Callable[[Any], None], way: str, ways: list[str]) -> None:
    experts, call = layer(), batch(9)
    before = experts(*call)
    experts(*call)
    change(experts)
    torch.testing.assert_close(experts(*call), 2 * before)
    assert ways == ["long", "short", way]


@torch.no_grad()
@pytest.mark.parametrize(
    ("which", "name", "value"),
    [
        ("qwen3_moe.Qwen3MoeExperts", "act_fn", nn.GELU(approximate="tanh")),
        ("qwen3_moe.Qwen3MoeExperts", "act_fn", nn.Tanh()),  # transformers runs it
        ("glm5_next.Glm5NextTextExperts", "swiglu_limit", 0.125),
        ("gpt_oss.GptOssExperts", "alpha", 0.5),
    ],
)
def test_an_activation_that_changes_is_read(which: str, name: str, value: Any, ways: list[str]) -> None:
    experts, call = layer(which, torch.float32), batch(9, torch.float32)
    first = experts(*call)
    setattr(experts, name, value)
    got, again = experts(*call), experts(*call)
    experts.config._experts_implementation = "eager"
    want = experts(*call)
    assert (first - want).norm() > 0.01 * want.norm()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(again, want)
    assert ways[0] == "long"
    assert ways[1:2] != ["short"]


@torch.no_grad()
def test_a_module_in_another_dtype_by_now(ways: list[str]) -> None:
    experts, call = layer(), batch(9)
    want = experts(*call)
    experts.float()
    got = experts(*(operand.float() if operand.is_floating_point() else operand for operand in call))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want.float(), atol=0.02, rtol=0.02)
    assert torch.equal(experts(*call), got.bfloat16())
    assert ways == ["long", "long", "long"]


@torch.no_grad()
def test_what_is_no_plain_tensor_is_refused_as_ever() -> None:
    experts, (hidden, ids, factors) = layer(), batch(4)
    experts(hidden, ids, factors)
    with pytest.raises(ConfigError, match=r"hidden is traced by .*plain tensor"):
        torch.func.vmap(lambda x: experts(x, ids, factors))(hidden.expand(2, 4, 8))


@torch.no_grad()
@pytest.mark.parametrize("path", [Path.REFERENCE, Path.W8A8])
def test_another_path_is_asked_for(path: Path, ways: list[str], caplog: pytest.LogCaptureFixture) -> None:
    register(path)
    experts, call = layer(dtype=torch.float32), batch(5, torch.float32)
    for _ in range(3):
        experts(*call)
    assert "short" not in ways
    assert (path is Path.W8A8) is any("not on epfuse" in record.message for record in caplog.records)


@torch.no_grad()
def test_a_profiler_sees_the_step() -> None:
    experts, call = layer(), batch(5)
    experts(*call)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        experts(*call)
    assert "epfuse::experts" in {event.key for event in seen.key_averages()}
