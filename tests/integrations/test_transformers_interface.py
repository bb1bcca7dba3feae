"""experts_implementation="epfuse" beside transformers' own: logits, tokens, files, FP8 experts, what is refused."""

from __future__ import annotations

import copy
import math
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from epfuse import Target
from epfuse.config import WeightFormat, silu_gate
from epfuse.errors import ConfigError
from epfuse.integrations.transformers import Layout, direct, forget, interface, register
from epfuse.integrations.transformers.read import scales_of, second_layout, weights_of
from tests.integrations.test_transformers_families import CLASSES, REFUSED, experts_of

EVERY = "EPFUSE_ALL_FAMILIES"
"""Where it is set, all families are walked; else a seeded share."""
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Of transformers' own tests of its experts implementations, absolute and relative."""
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"decoder_sparse_step": 1},
    "qwen2_moe": {"shared_expert_intermediate_size": 24},
    "mixtral": {},
    "olmoe": {"num_key_value_heads": 4},
    "glm4_moe": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "deepseek_v3": {
        **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_key_value_heads": 4},
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    },
    "ernie4_5_moe": {"moe_num_experts": 6, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "gpt_oss": {},
    "nemotron_h": {
        **{"layer_types": ["moe", "attention"], "moe_shared_expert_intermediate_size": 16, "mamba_num_heads": 4},
        **{"mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "n_group": 1, "topk_group": 1},
    },
}
"""model_type -> what it needs beside SIZES."""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registered, with nothing said and nothing known yet."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    interface._warn_once.cache_clear()
    register()
    yield
    forget()
    torch.set_num_threads(threads)


def built(kind: str, implementation: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    config = AutoConfig.for_model(kind, **(SIZES | MODELS[kind]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    for name, weight in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(weight, std=0.3)
    return model.to(dtype).eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == interface.__name__]


def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call that epfuse runs from now on."""
    calls: list[int] = []
    right, directly = interface.fused_experts, direct.run_experts

    def counted(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(hidden.shape[0])
        return right(hidden, *args, **kwargs)

    def counted_directly(call: Any, least: int) -> None:
        calls.append(call.hidden.shape[0])
        directly(call, least)

    monkeypatch.setattr(interface, "fused_experts", counted)
    monkeypatch.setattr(direct, "run_experts", counted_directly)
    return calls


class Routing:
    """Eager's choice of experts, for a second run whose router may choose others.

    Hidden states that differ by a rounding can swap two experts with nearly the same score. Such a token's logits say
    nothing about the experts, so it gets eager's ids and weights; all others keep what their own router says.
    """

    def __init__(self, model: Any) -> None:
        self.eager: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.calls = 0
        self.tokens = 0
        self.swapped = 0
        self.record = True
        asking = {name.partition(".")[2] for name in CLASSES}
        for module in model.modules():
            if type(module).__name__ in asking:
                module.register_forward_pre_hook(self.route)

    def route(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        hidden, ids, factors = args
        if self.record:
            self.eager.append((ids, factors))
            return None
        eager_ids, eager_factors = self.eager[self.calls]
        other = (ids.sort(dim=1).values != eager_ids.sort(dim=1).values).any(1, keepdim=True)
        self.calls += 1
        self.tokens += len(other)
        self.swapped += int(other.sum())
        return hidden, torch.where(other, eager_ids, ids), torch.where(other, eager_factors, factors)


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_logits_beside_eager(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = served(monkeypatch)
    model = built(kind, dtype=dtype)
    routing = Routing(model)
    eager = model(tokens()).logits
    routing.record = False
    model.set_experts_implementation("epfuse")
    ours = model(tokens()).logits
    torch.testing.assert_close(ours, eager, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    assert routing.calls == len(routing.eager) > 0
    assert routing.swapped <= (0 if dtype == torch.float32 else 0.05 * routing.tokens), routing.swapped
    assert len(calls) == routing.calls
    assert not said(caplog)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_64_greedy_tokens_and_back(kind: str) -> None:
    model = built(kind)
    options = {"max_new_tokens": 64, "do_sample": False, "attention_mask": torch.ones_like(tokens())}
    eager, logits = model.generate(tokens(), **options), model(tokens()).logits
    model.set_experts_implementation("epfuse")
    assert torch.equal(model.generate(tokens(), **options), eager)
    model.set_experts_implementation("eager")
    assert torch.equal(model(tokens()).logits, logits)


@torch.no_grad()
def test_a_folder_that_is_saved_has_the_same_names_and_bytes(tmp_path: Path) -> None:
    model = built("qwen3_moe", "eager")
    model.save_pretrained(tmp_path / "before")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "before", experts_implementation="epfuse")
    expected = ours(tokens()).logits
    torch.testing.assert_close(expected, model(tokens()).logits, atol=1e-4, rtol=1e-4)
    ours.save_pretrained(tmp_path / "after")
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "after").iterdir())
    for name in files:
        if name.endswith(".safetensors"):
            assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    after = ours.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    again = copy.deepcopy(ours)
    assert torch.equal(again(tokens()).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_weights_that_change_are_read_anew(kind: str) -> None:
    model = built(kind, "epfuse")
    first = model(tokens()).logits
    for name, weight in model.named_parameters():
        if name.endswith(("down_proj", "down_proj_bias")):
            weight.mul_(-2)
    changed = model(tokens()).logits
    model.set_experts_implementation("eager")
    torch.testing.assert_close(changed, model(tokens()).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(changed, first)


@torch.no_grad()
@pytest.mark.parametrize("form", ["dense", "fp8"])
def test_memory_that_a_module_drops_is_free_and_never_taken_for_the_next(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = experts_of("qwen3_moe.Qwen3MoeExperts") if form == "dense" else fp8_experts((1, 32), "ue8m0")
    module.config._experts_implementation = "epfuse"
    # a second layout, as a GPU has it, owns its memory: nothing but identity says what it was made from
    made: list[Any] = []
    monkeypatch.setattr(interface, "second_layout", lambda weights, *_: made.append(1) or copy.deepcopy(weights))
    hidden = module.gate_up_proj.shape[2]
    call = torch.ones(2, hidden, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    module(*call)
    module(*call)
    assert len(made) == 1
    for round_ in range(1, 9):
        before = StorageWeakRef(module.down_proj.untyped_storage())
        names = [name for name, weight in module.named_parameters() if "proj" in name]
        shapes = {name: (tuple(weight.shape), weight.dtype) for name, weight in module.named_parameters()}
        for name in names:
            setattr(module, name, None)  # freed, so that the next may get the same address
        assert before.expired()
        for name in names:
            shape, dtype = shapes[name]
            factor = 2.0**-6 if "scale" in name else 0.25 * round_
            setattr(module, name, nn.Parameter(torch.full(shape, factor).to(dtype), requires_grad=False))
        row = hidden * 0.25 * round_ * (1 if form == "dense" else 2.0**-6)
        middle = module.down_proj.shape[2]
        expected = middle * row * row / (1 + math.exp(-row)) * 0.25 * round_ * (1 if form == "dense" else 2.0**-6)
        torch.testing.assert_close(module(*call).float(), torch.full((2, hidden), expected), rtol=2e-2, atol=0)
        assert len(made) == 1 + round_


@torch.no_grad()
def test_experts_without_a_gate_skip_what_their_own_forward_fails_at(caplog: pytest.LogCaptureFixture) -> None:
    """Their own forward raises IndexError at an id that expert parallelism skips."""
    experts = experts_of("nemotron_h.NemotronHExperts", moe_intermediate_size=8)
    experts._is_expert_parallel = True
    generator = torch.Generator().manual_seed(1)
    hidden, factors = torch.randn(9, experts.up_proj.shape[2], generator=generator), torch.rand(9, 2)
    ids = torch.randint(0, 5, (9, 2), generator=generator)
    eager = experts(hidden, ids, factors)
    skipped = ids.clone()
    skipped[0, 0], factors[0, 0] = 5, 0.0
    with pytest.raises(IndexError):
        experts(hidden, skipped, factors)
    experts.config._experts_implementation = "epfuse"
    torch.testing.assert_close(experts(hidden, ids, factors)[1:], eager[1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(experts(hidden, skipped, factors)[1:], eager[1:], atol=1e-4, rtol=1e-4)
    assert not said(caplog)


def test_gradients_are_transformers_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, other = built("qwen3_moe", "epfuse"), built("qwen3_moe", "grouped_mm")
    for _ in range(2):
        model(tokens()).logits.square().mean().backward()
        other(tokens()).logits.square().mean().backward()
    grads = [(own.grad, theirs.grad) for own, theirs in zip(model.parameters(), other.parameters(), strict=True)]
    assert all(torch.equal(own, theirs) for own, theirs in grads if own is not None)
    (warning,) = said(caplog)
    assert "Qwen3MoeExperts runs as transformers would" in warning
    assert "gradients are on" in warning
    assert "torch.no_grad()" in warning
    with torch.inference_mode():
        model(tokens())
    assert len(said(caplog)) == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16], ids=str)
@pytest.mark.parametrize("which", ["mixtral.MixtralExperts", "gpt_oss.GptOssExperts"])
def test_expert_ids_may_be_integers_of_any_width(
    which: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls, experts = served(monkeypatch), experts_of(which, intermediate_size=8)
    hidden, ids, factors = torch.randn(9, 8), torch.rand(9, 5).topk(2).indices, torch.rand(9, 2)
    want = experts(hidden, ids, factors)
    experts.config._experts_implementation = "epfuse"
    for _ in range(2):
        torch.testing.assert_close(experts(hidden, ids.to(dtype), factors), want, atol=1e-4, rtol=1e-4)
    assert len(calls) == 2
    assert not said(caplog)


@torch.no_grad()
def test_expert_ids_that_are_no_integers_fall_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls, experts = served(monkeypatch), experts_of("mixtral.MixtralExperts", intermediate_size=8)
    hidden, ids, factors = torch.randn(9, 8), torch.rand(9, 5).topk(2).indices, torch.rand(9, 2)
    experts.config._experts_implementation = "grouped_mm"
    want = experts(hidden, ids.float(), factors)
    experts.config._experts_implementation = "epfuse"
    assert torch.equal(experts(hidden, ids.float(), factors), want)
    assert not calls
    assert "expert ids are torch.float32, no integers" in said(caplog)[0]


def test_experts_in_float64_run_as_eager_does(caplog: pytest.LogCaptureFixture) -> None:
    """transformers' own default, grouped_mm, refuses them."""
    experts = experts_of("mixtral.MixtralExperts").double()
    call = torch.randn(9, 8).double(), torch.rand(9, 5).topk(2).indices, torch.rand(9, 2).double()
    want = experts(*call)
    experts.config._experts_implementation = "epfuse"
    with torch.no_grad():
        assert torch.equal(experts(*call), want)
    (warning,) = said(caplog)
    assert "gate_up_proj has dtype torch.float64" in warning
    experts(*call).sum().backward()  # as torch.autograd.gradcheck asks for
    assert experts.down_proj.grad is not None
    assert "gradients are on" in said(caplog)[1]


@torch.no_grad()
def test_a_transposed_module_is_left_alone_where_nothing_may_be_copied(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    register(layout=interface.Layout.CHECKPOINT)
    calls, model = served(monkeypatch), built("gpt_oss", "epfuse")
    ours = model(tokens()).logits
    model.set_experts_implementation("eager")
    torch.testing.assert_close(ours, model(tokens()).logits, atol=1e-4, rtol=1e-4)
    assert not calls
    (warning,) = said(caplog)
    assert "transposed or interleaved" in warning
    assert "Layout.CHECKPOINT" in warning


UNUSUAL = [
    "aria.AriaExperts",
    "gemma4.Gemma4TextExperts",
    "gpt_oss.GptOssExperts",
    "inkling2.Inkling2Experts",
    "nemotron_h.NemotronHExperts",
    "openai_privacy_filter.OpenAIPrivacyFilterExperts",
]
"""Layouts, biases and activations that few have."""


def families() -> list[str]:
    names = sorted(set(CLASSES) - set(REFUSED) - set(UNUSUAL))
    return [*(names if os.environ.get(EVERY) else sorted(random.Random(0).sample(names, 8))), *UNUSUAL]


@torch.no_grad()
@pytest.mark.parametrize("which", families())
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_family(which: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    experts = experts_of(which).to(dtype)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(24, 8, generator=generator).to(dtype)
    ids = torch.rand(24, 5, generator=generator).topk(2).indices
    if not which.startswith(("gpt_oss.", "openai_privacy_filter.", "nemotron_h.")):  # whose eager fails at such an id
        ids[0, 0] = 5  # transformers' expert parallelism masks so
    factors = torch.rand(24, 2, generator=generator).to(dtype)
    experts._is_expert_parallel = True
    eager = experts(hidden, ids, factors)
    experts.config._experts_implementation = "epfuse"
    ours = experts(hidden, ids, factors)
    scale = eager.float().abs().amax(1, keepdim=True)
    error = ((ours - eager).float().abs() / scale.clamp_min(1e-3)).max()
    assert error < 5 * torch.finfo(dtype).eps + 1e-6, error
    assert not said(caplog)


@torch.no_grad()
@pytest.mark.parametrize("which", families())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_family_is_nearer_to_float64(which: str, dtype: torch.dtype) -> None:
    """Than transformers' "eager", which rounds between gate and up and down, and each route's row once more."""
    sizes = dict.fromkeys(("hidden_size", "moe_hidden_size"), 64)
    experts = experts_of(which, **sizes, **dict.fromkeys(("moe_intermediate_size", "intermediate_size"), 48))
    for weight in experts.parameters():
        weight.mul_(0.3)
    experts.to(dtype)
    generator = torch.Generator().manual_seed(3)
    hidden, factors = (torch.randn(200, size, generator=generator).to(dtype) for size in (64, 2))
    ids = torch.rand(200, 5, generator=generator).topk(2).indices
    exact = copy.deepcopy(experts).double()(hidden.double(), ids, factors.double())
    off = {}
    for implementation in ("eager", "grouped_mm", "epfuse"):
        experts.config._experts_implementation = implementation
        off[implementation] = float((experts(hidden, ids, factors).double() - exact).norm() / exact.norm())
    # the privacy filter's eager computes in FP32 from end to end
    rival = "grouped_mm" if which.startswith("openai_privacy_filter.") else "eager"
    assert off["epfuse"] < 0.97 * off[rival], off


def fp8_experts(block: tuple[int, int] | None, scales: str, **options: Any) -> Any:
    """FP8Experts of two experts and their numbers in float64, gate_up and down."""
    config = AutoConfig.for_model("qwen3_moe", **(SIZES | {"hidden_size": 256, "moe_intermediate_size": 128}))
    kind = use_experts_implementation(
        type("FP8Experts", (FP8Experts,), {}), experts_interface=ALL_FP8_EXPERTS_FUNCTIONS
    )
    module = kind(config, block_size=block, scale_fmt=scales, **options)
    generator = torch.Generator().manual_seed(0)
    for name, weight in module.named_parameters():
        weight.requires_grad_(False)
        if "scale" in name:
            exponents = torch.randint(-8, -4, weight.shape, generator=generator)
            factor = 1.0 if scales == "ue8m0" or block == (1, 32) else 1.37
            weight.copy_(factor * 2.0**exponents)
        elif weight.dtype != torch.int8:
            weight.copy_(torch.randn(weight.shape, generator=generator))
    config._experts_implementation = "epfuse"
    return module


def numbers(values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    wide = scales.double().repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)
    return values.double() * wide[:, : values.shape[1], : values.shape[2]]


@torch.no_grad()
@pytest.mark.parametrize("block", [(1, 32), (128, 128)], ids=str)
@pytest.mark.parametrize("scales", ["ue8m0", "float"])
def test_fp8_experts_keep_their_weights(block: tuple[int, int], scales: str, caplog: pytest.LogCaptureFixture) -> None:
    module = fp8_experts(block, scales)
    before = {name: tensor.view(torch.uint8).clone() for name, tensor in module.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 256, generator=generator).bfloat16()
    factors, ids = torch.rand(9, 6, generator=generator).topk(2)
    ids[3, 1] = 6  # no expert of this rank
    ours = module(hidden, ids, factors)
    w13 = numbers(module.gate_up_proj, module.gate_up_proj_scale_inv, block)
    w2 = numbers(module.down_proj, module.down_proj_scale_inv, block)
    expected = torch.zeros(9, 256, dtype=torch.float64)
    for token, slot in (ids < 6).nonzero().tolist():
        gate, up = (w13[ids[token, slot]] @ hidden[token].double()).chunk(2)
        expected[token] += factors[token, slot] * (w2[ids[token, slot]] @ (nn.functional.silu(gate) * up))
    assert (ours.double() - expected).norm() / expected.norm() < 8e-3
    assert not said(caplog)
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name].view(torch.uint8), before[name]) for name in before)
    assert interface._STATES[module].second is None
    stacks = next(iter(weights_of(module, scales_of(module)).kept.values()))
    assert stacks.w13.values.data_ptr() == module.gate_up_proj.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block": (128, 128), "scales": "float", "activation_scheme": "static"}, "static scales of its activations"),
        ({"block": (128, 128), "scales": "ue8m0", "expert_dtype": "fp4"}, "in int8: two FP4 numbers in a byte"),
        ({"block": (1, 128), "scales": "float"}, r"a scale per \(1, 128\); epfuse reads 1x32 and 128x128"),
        ({"block": None, "scales": "float"}, "a scale per tensor"),
    ],
)
def test_fp8_experts_that_fall_back(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = fp8_experts(options.pop("block"), options.pop("scales"), **options)
    ran: list[str] = []

    def remember(name: str) -> Any:
        return lambda *args, **kwargs: ran.append(name)

    monkeypatch.setitem(ALL_FP8_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", remember("grouped_mm"))
    if module.activation_scheme == "static":
        monkeypatch.setattr(FP8Experts, "linear", remember("eager"))
    for _ in range(2):
        try:
            module(torch.randn(1, 256).bfloat16(), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
        except (AttributeError, TypeError):  # the eager loop goes on with what our stand-in gave it
            assert ran[-1] == "eager"
    assert set(ran) == {"eager" if "static" in words else "grouped_mm"}
    (warning,) = said(caplog)
    assert re.search(words, warning)


@torch.no_grad()
def test_scales_per_32_that_mxfp8_cannot_hold_fall_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = fp8_experts((1, 32), "float")
    module.down_proj_scale_inv[0, 0, 0] = 0.3
    monkeypatch.setitem(ALL_FP8_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", lambda *args: "theirs")
    call = (torch.randn(1, 256).bfloat16(), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    assert module(*call) == "theirs"
    assert "no powers of two" in said(caplog)[0]
    module.down_proj_scale_inv[0, 0, 0] = 0.25
    assert isinstance(module(*call), torch.Tensor)


@torch.no_grad()
@pytest.mark.parametrize(
    ("block", "target", "form"),
    [
        ((1, 32), Target.SM90, WeightFormat.FRAGMENT),
        ((1, 32), Target.GFX942, WeightFormat.MXFP8_FNUZ),
        ((128, 128), Target.GFX942, WeightFormat.BLOCK_FP8_FNUZ),
        ((128, 128), Target.SM90, None),
        ((1, 32), Target.GFX950, None),
    ],
)
def test_a_second_layout_leaves_the_first_alone(
    block: tuple[int, int], target: Target, form: WeightFormat | None
) -> None:
    module = fp8_experts(block, "ue8m0")
    before = {name: tensor.view(torch.uint8).clone() for name, tensor in module.state_dict().items()}
    weights = weights_of(module, scales_of(module))
    second = second_layout(weights, target, silu_gate())
    assert (second is weights) is (form is None)
    assert form is None or list(second.kept) == [form]
    assert sum(second.nbytes.values()) <= 1.05 * sum(weights.nbytes.values())
    assert all(torch.equal(tensor.view(torch.uint8), before[name]) for name, tensor in module.state_dict().items())


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="path is 'bf16'"):
        register("bf16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="layout is 'own'"):
        register(layout="own")  # type: ignore[arg-type]
    register(layout=Layout.CHECKPOINT)
    assert "epfuse" in ALL_EXPERTS_FUNCTIONS
    assert "epfuse" in ALL_FP8_EXPERTS_FUNCTIONS


def test_a_thread_sees_all_of_a_module_or_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A call that comes while another thread finds out about the module runs on epfuse, and finds out nothing twice."""
    model = built("gpt_oss", "epfuse")
    found: list[str] = []
    inside = threading.Event()
    right = interface.activation_of

    def slow(name: str, module: Any) -> Any:
        found.append(name)
        inside.set()
        time.sleep(0.3)
        return right(name, module)

    monkeypatch.setattr(interface, "activation_of", slow)
    experts = next(module for module in model.modules() if hasattr(module, "gate_up_proj"))
    hidden = torch.randn(3, SIZES["hidden_size"])
    scores, ids = torch.rand(3, SIZES["num_local_experts"]).topk(2)
    results: list[torch.Tensor] = []

    @torch.no_grad()
    def call() -> None:
        results.append(experts(hidden, ids, scores))

    first, second = threading.Thread(target=call), threading.Thread(target=call)
    first.start()
    assert inside.wait(30)
    second.start()
    first.join(30)
    second.join(30)
    assert torch.equal(results[0], results[1])
    assert (len(found), said(caplog)) == (1, [])


@torch.no_grad()
@pytest.mark.parametrize(("kind", "copied"), [("gpt_oss", True), ("qwen3_moe", False)])
def test_forget_is_for_writes_that_torch_does_not_count(kind: str, copied: bool) -> None:
    """A copy in another order goes on with the old weights until then; weights that are read in place never do."""
    model = built(kind, "epfuse")
    before = model(tokens()).logits
    for name, parameter in model.named_parameters():
        if name.endswith("down_proj"):
            parameter.data.mul_(3)
    assert torch.equal(model(tokens()).logits, before) is copied
    forget()
    mine = model(tokens()).logits
    model.set_experts_implementation("eager")
    torch.testing.assert_close(mine, model(tokens()).logits, rtol=1e-4, atol=1e-4)
