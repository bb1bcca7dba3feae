"""experts_implementation="epfuse" in models that are trained, copied, traced or compiled; tensors beside parameters."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from epfuse.integrations.transformers import interface, replace_experts
from epfuse.parallel.group import EPGroup
from tests.integrations.test_transformers_families import CLASSES, experts_of
from tests.integrations.test_transformers_interface import built, registered, said, served, tokens

__all__ = ["registered"]  # a fixture that every test here uses


def small(which: str) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """Experts that run on epfuse, and the operands of a call."""
    experts = experts_of(which, moe_intermediate_size=8, intermediate_size=8)  # grouped products want 16 bytes
    experts.config._experts_implementation = "epfuse"
    return experts, operands(1)


def operands(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(6, 5, generator=generator).topk(2).indices
    return torch.randn(6, 8, generator=generator), ids, torch.rand(6, 2, generator=generator)


def eager(experts: Any, call: tuple[torch.Tensor, ...]) -> torch.Tensor:
    experts.config._experts_implementation = "eager"
    found = experts(*call)
    experts.config._experts_implementation = "epfuse"
    return found


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_weights_after_an_optimizers_step_are_new(kind: dict[str, bool]) -> None:
    """Torch counts no write of a fused one, which transformers' Trainer takes by default."""
    experts, call = small("gpt_oss.GptOssExperts")
    with torch.no_grad():
        before = experts(*call)
    optimizer = torch.optim.AdamW(experts.parameters(), lr=0.1, **kind)
    experts(*call).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(experts(*call), eager(experts, call), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(experts(*call), before, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("held", ["buffers", "attributes"])
def test_tensors_that_are_no_parameters_are_read_anew(held: str) -> None:
    experts, call = small(next(name for name in CLASSES if name.startswith("aria.")))
    experts(*call)
    for name in ("gate_up_proj", "down_proj"):
        tensor = getattr(experts, name).detach().clone()
        delattr(experts, name)
        if held == "buffers":
            experts.register_buffer(name, tensor)
        else:
            setattr(experts, name, tensor)
    experts(*call)
    experts.down_proj.mul_(-2)
    torch.testing.assert_close(experts(*call), eager(experts, call), atol=1e-4, rtol=1e-4)


def test_tensors_that_are_no_parameters_may_want_gradients(caplog: pytest.LogCaptureFixture) -> None:
    """FSDP and DataParallel put views of the parameters in their place."""
    experts, call = small("qwen3_moe.Qwen3MoeExperts")
    with torch.no_grad():
        experts(*call)
    whole = {name: getattr(experts, name).detach().clone().requires_grad_() for name in ("gate_up_proj", "down_proj")}
    for name, tensor in whole.items():
        delattr(experts, name)
        setattr(experts, name, tensor * 1.0)
    experts(*call).sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in whole.values())
    assert len(said(caplog)) == 1


@torch.no_grad()
@pytest.mark.parametrize("known", [False, True])
def test_traces_and_exports_hold_transformers_own(
    known: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And leave the module as it was."""
    experts, call = small("qwen3_moe.Qwen3MoeExperts")
    experts.requires_grad_(False)
    if known:
        experts(*call)
    traced = torch.jit.trace(lambda *args: experts(*args), call, check_trace=False)
    exported = torch.export.export(experts, call, strict=False).module()
    other = operands(2)
    for program in (traced, exported):
        torch.testing.assert_close(program(*other), eager(experts, other), atol=1e-5, rtol=1e-5)
    (warning,) = said(caplog)
    assert "no part of a traced graph" in warning
    calls = served(monkeypatch)
    experts(*other)
    assert len(calls) == 1


@torch.no_grad()
def test_a_compiled_model_breaks_its_graph_at_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("qwen3_moe")
    wanted = model(tokens(), use_cache=False).logits
    model.set_experts_implementation("epfuse")
    calls = served(monkeypatch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, wanted, atol=1e-4, rtol=1e-4)
    assert len(calls) == 2
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"without\s+fullgraph=True"):
        torch.compile(model, backend="eager", fullgraph=True)(tokens(), use_cache=False)
    torch._dynamo.reset()
    replace_experts(model, EPGroup.single())  # which is traced
    whole = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(tokens(), use_cache=False).logits, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_copies_of_a_model_are_on_their_own() -> None:
    model = built("gpt_oss", "epfuse")
    wanted = model(tokens()).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied, read = copy.deepcopy(model), torch.load(file, weights_only=False)
    for weight in copied.parameters():
        weight.mul_(1.5)
    assert torch.equal(read(tokens()).logits, wanted)
    assert torch.equal(model(tokens()).logits, wanted)
    changed = copied(tokens()).logits
    copied.set_experts_implementation("eager")
    torch.testing.assert_close(changed, copied(tokens()).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_training_has_transformers_gradients(reentrant: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A reentrant one runs first without gradients, on epfuse, and again with them."""
    models = [built("qwen3_moe", implementation) for implementation in ("epfuse", "grouped_mm")]
    for model in models:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model(tokens(), use_cache=False).logits.square().mean().backward()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)
    assert len(said(caplog)) == 1


@torch.no_grad()
def test_a_static_cache_generates_the_same_tokens() -> None:
    model = built("qwen3_moe")
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    options["attention_mask"] = torch.ones_like(tokens())
    wanted = model.generate(tokens(), **options)
    model.set_experts_implementation("epfuse")
    assert torch.equal(model.generate(tokens(), **options), wanted)


@torch.no_grad()
def test_no_token_and_experts_in_two_places() -> None:
    experts, call = small("gpt_oss.GptOssExperts")
    assert experts(*(tensor[:0] for tensor in call)).shape == (0, 8)
    twin = nn.ModuleDict({"first": experts, "second": copy.deepcopy(experts)})
    twin["second"].down_proj = experts.down_proj  # one parameter of two modules
    first = experts(*call)
    assert torch.equal(twin["second"](*call), first)
    experts.down_proj.mul_(2)
    for module in twin.values():
        torch.testing.assert_close(module(*call), eager(module, call), atol=1e-4, rtol=1e-4)


def test_optimizers_are_watched_once() -> None:
    from torch.optim import optimizer

    before = len(optimizer._global_optimizer_post_hooks)
    interface.register()
    interface.register()
    assert len(optimizer._global_optimizer_post_hooks) == before
