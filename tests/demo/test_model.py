from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from epfuse.demo.model import build_model, model_config, seed_weights
from epfuse.demo.settings import DemoSettings, ModelSize
from epfuse.demo.text import encode, read_text
from epfuse.demo.untouched import ROUTING_TIE, comparable_tokens, greedy, rms, run_untouched
from epfuse.errors import ConfigError


@pytest.fixture(scope="module")
def model() -> Any:
    model = build_model(ModelSize(), torch.float32, "cpu")
    seed_weights(model, 0)
    return model


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return torch.tensor(encode(read_text(None).data, 256))


def test_architecture_switches_are_minimax_m3s() -> None:
    from transformers import MiniMaxM3VLTextConfig

    real, small = MiniMaxM3VLTextConfig(), model_config(ModelSize())
    for name in (
        "num_local_experts",
        "num_experts_per_tok",
        "routed_scaling_factor",
        "swiglu_alpha",
        "swiglu_limit",
        "hidden_act",
        "rms_norm_eps",
        "tie_word_embeddings",
        "index_local_blocks",
        "model_type",
    ):
        assert getattr(small, name) == getattr(real, name), name
    assert small.mlp_layer_types == ["dense", "sparse", "sparse", "sparse"]
    assert small.layer_types == ["full_attention"] + ["minimax_m3_sparse"] * 3


@torch.no_grad()
def test_experts_matter_and_the_clamp_bites(model: Any, prompt: torch.Tensor) -> None:
    run = run_untouched(model, prompt, new_tokens=2)
    for layer in run.layers.values():
        assert 0.001 < layer.clamped < 0.1
        assert 0.3 < rms(layer.exact) < 3
        assert (torch.bincount(layer.topk_ids.flatten(), minlength=128) > 0).sum() > 48
    muted = build_model(ModelSize(), torch.float32, "cpu")
    muted.load_state_dict({k: v * 0 if k.endswith("experts.down_proj") else v for k, v in model.state_dict().items()})
    assert rms(muted(run.prompt[None]).logits[0] - run.logits) > 0.5 * run.logits_scale


@torch.no_grad()
def test_correction_bias_decides_some_routes(model: Any, prompt: torch.Tensor) -> None:
    plain = build_model(ModelSize(), torch.float32, "cpu")
    plain.load_state_dict({k: v * 0 if k.endswith("correction_bias") else v for k, v in model.state_dict().items()})
    assert not torch.equal(plain(prompt[None]).logits, model(prompt[None]).logits)


def test_same_seed_same_model_other_seed_other_model(model: Any) -> None:
    again = build_model(ModelSize(), torch.float32, "cpu")
    seed_weights(again, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    seed_weights(again, 1)
    assert not torch.equal(model.lm_head.weight, again.lm_head.weight)


@torch.no_grad()
def test_cached_decoding_agrees_with_reading_it_all_again(model: Any, prompt: torch.Tensor) -> None:
    tokens = greedy(model, prompt[:100], 3)
    seen = torch.cat([prompt[:100], torch.tensor(tokens[:2])])
    assert int(model(seen[None]).logits[0, -1].argmax()) == tokens[2]


def test_the_prompt_ends_before_a_routing_tie() -> None:
    margins = torch.tensor([1.0, 0.5, ROUTING_TIE / 2, 0.5])
    assert comparable_tokens(margins) == 2
    assert comparable_tokens(margins[:2]) == 2
    assert comparable_tokens(margins[2:]) == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ranks": 0}, "ranks"),
        ({"ranks": 3}, "ranks"),
        ({"tokens": 0}, "tokens"),
        ({"dtype": "int8"}, "dtype"),
        ({"seed": -1}, "seed"),
    ],
)
def test_refuses_settings_out_of_range(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        DemoSettings(**changes)
