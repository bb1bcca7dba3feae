"""Hugging Face configs: the families that are understood, and clear words about every other one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from epfuse import SwiGLUOAI
from epfuse.errors import ConfigError
from epfuse.weights.checkpoint_format import Checkpoint
from epfuse.weights.model_config import MINIMAX_M3, read_model

M3_TEXT = {
    "model_type": "minimax_m3_vl_text",
    "hidden_size": 6144,
    "intermediate_size": 3072,
    "num_hidden_layers": 60,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "moe_layer_freq": [0] * 3 + [1] * 57,
}
M3 = {"model_type": "minimax_m3_vl", "text_config": M3_TEXT, "quantization_config": {"quant_method": "mxfp8"}}
GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "experts_per_token": 4,
    "swiglu_limit": 7.0,
    "quantization_config": {"quant_method": "mxfp4"},
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
}
QWEN = {
    "model_type": "qwen2_moe",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [1],
    "hidden_act": "silu",
}

QWEN_FP8 = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "hidden_act": "silu",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(48))],
    },
}
"""Qwen3-30B-A3B-FP8's."""


def write(tmp_path: Path, config: object) -> Path:
    path = tmp_path / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_minimax_m3(tmp_path: Path) -> None:
    model = read_model(write(tmp_path, M3))
    assert {**vars(model), "name": MINIMAX_M3.name} == vars(MINIMAX_M3)


def test_minimax_m3_by_the_newer_list_of_layer_types(tmp_path: Path) -> None:
    text = {key: value for key, value in M3_TEXT.items() if key != "moe_layer_freq"}
    types = ["dense"] * 3 + ["sparse"] * 57
    assert read_model(write(tmp_path, text | {"mlp_layer_types": types})).moe_layers == MINIMAX_M3.moe_layers


def test_minimax_m3_as_transformers_writes_it(tmp_path: Path) -> None:
    module = pytest.importorskip("transformers.models.minimax_m3_vl.configuration_minimax_m3_vl")
    config = module.MiniMaxM3VLConfig(text_config={"moe_layer_freq": [0] * 3 + [1] * 57})
    config.save_pretrained(tmp_path)
    model = read_model(tmp_path / "config.json")
    assert (model.hidden, model.experts, model.moe_layers) == (6144, 128, MINIMAX_M3.moe_layers)
    assert model.checkpoint is Checkpoint.BF16


def test_gpt_oss(tmp_path: Path) -> None:
    model = read_model(write(tmp_path, GPT_OSS))
    assert (model.hidden, model.intermediate, model.experts, model.top_k) == (2880, 2880, 128, 4)
    assert model.moe_layers == tuple(range(36))
    assert (model.activation, model.checkpoint, model.shared_experts) == (SwiGLUOAI(), Checkpoint.MXFP4, 0)


def test_mixtral(tmp_path: Path) -> None:
    model = read_model(write(tmp_path, MIXTRAL))
    assert (model.intermediate, model.experts, model.top_k) == (14336, 8, 2)
    assert model.activation == SwiGLUOAI(alpha=1.0, beta=0.0, limit=math.inf)
    assert model.checkpoint is Checkpoint.BF16


def test_qwen(tmp_path: Path) -> None:
    model = read_model(write(tmp_path, QWEN))
    assert (model.intermediate, model.experts, model.shared_experts) == (1408, 60, 1)
    assert model.moe_layers == tuple(range(3, 24, 2))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "is not JSON"),
        ([], "is a list"),
        ({"model_type": "llama"}, "'llama'; known are"),
        ({}, "type None; known are"),
        (MIXTRAL | {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (MIXTRAL | {"num_local_experts": "8"}, "num_local_experts is '8'"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "9 experts a token"),
        (MIXTRAL | {"hidden_size": None}, "none of hidden_size is there"),
        (MIXTRAL | {"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'; it must be one of mxfp8"),
        (MIXTRAL | {"quantization_config": []}, "quantization_config is \\[\\]"),
        (GPT_OSS | {"swiglu_limit": -1}, "swiglu_limit is -1"),
        (GPT_OSS | {"swiglu_alpha": "1"}, "swiglu_alpha is '1'"),
        (M3_TEXT | {"moe_layer_freq": [1]}, "moe_layer_freq must be a list with 60 entries"),
        (M3_TEXT | {"moe_layer_freq": [0] * 60}, "no layer has experts"),
        (QWEN | {"mlp_only_layers": 3}, "mlp_only_layers must be a list"),
    ],
)
def test_what_is_not_understood_is_named(tmp_path: Path, config: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_model(write(tmp_path, config))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        read_model(tmp_path / "config.json")
