"""The checkpoint that is served: it recites, only with all of its experts, and its files hold the model's numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from epfuse.demo.text import encode
from epfuse.numerics.mxfp8 import decode
from tests.integrations.vllm_e2e import checkpoint
from tests.integrations.vllm_e2e.checkpoint import LOGIT, PROMPT, SENTENCES, SIZE

HALF = SIZE.experts // 2


@pytest.fixture(scope="module")
def model() -> Any:
    return checkpoint.build()


def margins(model: Any) -> torch.Tensor:
    """By how much the right byte's logit exceeds the best other one, for every byte of every answer."""
    found = []
    for sentence in SENTENCES:
        ids = torch.tensor(encode(sentence.encode(), 1 + len(sentence)))
        with torch.no_grad():
            logits = model(ids[None], use_cache=False).logits[0, PROMPT:-1].float()
        right = ids[PROMPT + 1 :, None]
        best = logits.scatter(1, right, -torch.inf).amax(1)
        found.append(logits.gather(1, right)[:, 0] - best)
    return torch.cat(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_recites_with_wide_margins(model, dtype):
    model.to(dtype)
    try:
        assert margins(model).min() > LOGIT / 4
    finally:
        model.float()


@pytest.mark.parametrize("fault", ["one rank's experts are missing", "the ranks' experts are exchanged"])
def test_it_does_not_recite_with_wrong_experts(model, fault):
    down = [weight for name, weight in model.named_parameters() if name.endswith("experts.down_proj")]
    kept = [weight.clone() for weight in down]
    with torch.no_grad():
        for weight in down:
            weight.copy_(weight.roll(HALF, 0)) if "exchanged" in fault else weight[HALF:].zero_()
    wrong = (margins(model) < 0).float().mean()
    with torch.no_grad():
        for weight, before in zip(down, kept, strict=True):
            weight.copy_(before)
    assert wrong > 0.2


def test_the_files_hold_the_models_numbers(model, tmp_path):
    checkpoint.write_checkpoint(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    experts = dict(model.named_parameters())["model.layers.1.mlp.experts.gate_up_proj"]
    name = "model.layers.1.block_sparse_moe.experts.5."
    for part, expected in zip(("w1", "w3"), experts[5].chunk(2), strict=True):
        values, scales = found[f"{name}{part}.weight"], found[f"{name}{part}.weight_scale_inv"]
        assert (values.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.uint8)
        assert torch.equal(decode(values, scales), expected)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp8"


def test_the_tokenizer_has_one_token_a_byte(tmp_path):
    from transformers import PreTrainedTokenizerFast

    checkpoint.save_tokenizer(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "aé\n\x00 ~\x7f"
    ids = tokenizer(text)["input_ids"]
    assert ids == encode(text.encode(), 100)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
