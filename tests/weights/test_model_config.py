"""Hugging Face configs: the families that are understood, and clear words about every other one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from epfuse import SwiGLUOAI
from epfuse.config import GELUTanh, ReLU2, SoftcappedSwiGLU
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
NEMOTRON_H = {
    "model_type": "nemotron_h",
    "hidden_size": 4096,
    "moe_latent_size": 1024,
    "moe_intermediate_size": 2688,
    "intermediate_size": 5376,
    "num_hidden_layers": 6,
    "hybrid_override_pattern": "ME*E-E",
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "n_shared_experts": 1,
    "mlp_hidden_act": "relu2",
}
GEMMA4: dict[str, Any] = {
    "model_type": "gemma4",
    "text_config": {
        "model_type": "gemma4_text",
        "hidden_size": 2816,
        "moe_intermediate_size": 704,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}
INKLING2 = {
    "model_type": "inkling2_text",
    "hidden_size": 4608,
    "moe_intermediate_size": 2304,
    "num_hidden_layers": 48,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "mlp_gate_softcap": 3.0,
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
MXFP8_GROUP = {
    "targets": ["Linear"],
    "weights": {
        "num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False,
        "scale_dtype": "torch.uint8", "observer": "memoryless_minmax",
    },
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True},
}  # fmt: skip


def groups(**made: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": made}


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


def test_nemotron_h_says_its_layers_in_a_list_or_in_letters(tmp_path: Path) -> None:
    model = read_model(write(tmp_path, NEMOTRON_H))
    assert (model.hidden, model.intermediate, model.experts, model.top_k) == (1024, 2688, 512, 22)  # H of the latents
    assert (model.layers, model.moe_layers, model.activation) == (6, (1, 3, 5), ReLU2())
    kinds = ["mamba", "moe", "attention", "moe", "mlp", "moe"]
    listed = {
        key: value for key, value in NEMOTRON_H.items() if key not in ("hybrid_override_pattern", "num_hidden_layers")
    }
    assert read_model(write(tmp_path, listed | {"layers_block_type": kinds})) == model
    assert read_model(write(tmp_path, NEMOTRON_H | {"layers_block_type": kinds})) == model
    for changes, words in (
        ({"hybrid_override_pattern": "MEMEX"}, "hybrid_override_pattern has 'X'"),
        ({"hybrid_override_pattern": None}, "neither layers_block_type nor"),
        ({"hybrid_override_pattern": ""}, "0 kinds of layers"),
        ({"hybrid_override_pattern": "ME" * 300}, "600 kinds of layers"),
        ({"num_hidden_layers": 7}, "num_hidden_layers is 7, and 6 kinds are listed"),
        ({"layers_block_type": kinds[::-1]}, "contradict each other"),
        ({"layers_block_type": [*kinds[:5], "zero"]}, "layers_block_type has 'zero'"),
        ({"mlp_hidden_act": "silu"}, "it must be 'relu2'"),
        ({"moe_latent_size": -1}, "moe_latent_size is -1"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_model(write(tmp_path, NEMOTRON_H | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"enable_moe_block": False}, "no layer has experts"),
        ({"enable_moe_block": 1}, "it must be true or false"),
        ({"hidden_activation": "gelu"}, "it must be 'gelu_pytorch_tanh'"),
        ({"top_k_experts": 129}, "129 experts a token"),
    ],
)
def test_gemma4_says_whether_it_has_experts(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    model = read_model(write(tmp_path, GEMMA4))
    assert (model.hidden, model.intermediate, model.experts, model.top_k) == (2816, 704, 128, 8)
    assert (model.activation, len(model.moe_layers)) == (GELUTanh(), 30)
    with pytest.raises(ConfigError, match=words):
        read_model(write(tmp_path, GEMMA4 | {"text_config": GEMMA4["text_config"] | changes}))


def test_soft_caps_are_positive(tmp_path: Path) -> None:
    assert read_model(write(tmp_path, INKLING2)).activation == SoftcappedSwiGLU(3.0, 25.0)
    with pytest.raises(ConfigError, match="mlp_gate_softcap or mlp_up_softcap is out of range"):
        read_model(write(tmp_path, INKLING2 | {"mlp_gate_softcap": 0}))


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
        (M3_TEXT | {"moe_layer_freq": [0.0] * 60}, "moe_layer_freq has 0.0"),
        (M3_TEXT | {"mlp_layer_types": ["dense"] * 60}, "mlp_layer_types and moe_layer_freq contradict"),
        (M3_TEXT | {"mlp_layer_types": ["linear"] * 60}, "mlp_layer_types has 'linear'"),
        (
            MIXTRAL | {"num_hidden_layers": 2**31 - 1},
            "num_hidden_layers is 2147483647; it must be an integer, at least 1",
        ),
        (MIXTRAL | {"num_hidden_layers": 32.0}, "num_hidden_layers is 32.0"),
        (MIXTRAL | {"num_hidden_layers": True}, "num_hidden_layers is True"),
        (MIXTRAL | {"hidden_size": 10**400}, "hidden_size is 1000"),
        (MIXTRAL | {"num_experts": 16}, "num_local_experts=8 and num_experts=16 contradict"),
        (MIXTRAL | {"swiglu_limit": 10}, "swiglu_limit is 10, which mixtral is not known to have"),
        (MIXTRAL | {"zero_expert_num": 2}, "zero_expert_num is 2"),
        (MIXTRAL | {"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'"),
        (MIXTRAL | {"vision_config": {"num_experts": 4}}, "vision_config has experts of its own"),
        (MIXTRAL | {"model_type": ["mixtral"]}, "model_type is"),
        (MIXTRAL | {"text_config": [1]}, "text_config is"),
        ({"model_type": "some_new_wrapper", "text_config": MIXTRAL | {"model_type": "unknown"}}, "of type 'unknown'"),
        ({"model_type": "mixtral", "text_config": {"model_type": "unknown"}}, "of type 'unknown'"),
        ({"model_type": "minimax_m3_vl", "text_config": MIXTRAL, "language_config": MIXTRAL}, "several of"),
        (QWEN | {"mlp_only_layers": 3}, "mlp_only_layers must be a list"),
    ],
)
def test_what_is_not_understood_is_named(tmp_path: Path, config: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_model(write(tmp_path, config))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        read_model(tmp_path / "config.json")


@pytest.mark.parametrize("kind", ["minimax_m3_vl_text", "minimax_m3_text", "minimax_m3", None, "unknown"])
@pytest.mark.parametrize("outer", ["minimax_m3_vl", "some_new_wrapper"])
def test_the_language_models_type_counts(tmp_path: Path, kind: str | None, outer: str) -> None:
    config = {"model_type": outer, "text_config": M3_TEXT | {"model_type": kind}}
    if kind in (None, "unknown") and outer == "some_new_wrapper":
        with pytest.raises(ConfigError, match=f"of type {kind!r}"):
            read_model(write(tmp_path, config))
    else:
        assert read_model(write(tmp_path, config)).moe_layers == MINIMAX_M3.moe_layers


def test_m3_alone_has_its_plain_names(tmp_path: Path) -> None:
    for kind in ("minimax_m3", "minimax_m3_text"):
        assert read_model(write(tmp_path, M3_TEXT | {"model_type": kind})).experts == 128


def test_step_says_layers_and_limits_with_those_of_its_mtp_layers(tmp_path: Path) -> None:
    """The fields of a hub file: an enumeration in a string, limits for 45 layers and 3 more."""
    step = {
        "model_type": "step3p5", "hidden_size": 4096, "moe_intermediate_size": 1280, "intermediate_size": 11264,
        "num_hidden_layers": 45, "num_nextn_predict_layers": 3, "moe_num_experts": 288, "moe_top_k": 8,
        "share_expert_dim": 1280, "moe_layers_enum": ",".join(map(str, range(3, 45))),
        "swiglu_limits": [0.0] * 43 + [7, 7, 0.0, 0.0, 0.0], "swiglu_limits_shared": [0.0] * 48,
    }  # fmt: skip
    model = read_model(write(tmp_path, step))
    assert (model.experts, model.top_k, model.moe_layers) == (288, 8, tuple(range(3, 45)))
    assert model.other_activations == ((43, None), (44, None))
    assert (model.activation_at(44), model.activation_at(42)) == (None, SwiGLUOAI(1.0, 0.0, math.inf))
    with pytest.raises(ConfigError, match="moe_layers_enum is '3,x'"):
        read_model(write(tmp_path, step | {"moe_layers_enum": "3,x"}))
    with pytest.raises(ConfigError, match="moe_layers_enum has 99"):
        read_model(write(tmp_path, step | {"moe_layers_enum": [3, 99]}))


def test_activations_dtype(tmp_path: Path) -> None:
    for said, dtype in (
        ("float16", "float16"),
        ("torch.bfloat16", "bfloat16"),
        ("float32", "bfloat16"),
        (None, "bfloat16"),
    ):
        assert read_model(write(tmp_path, MIXTRAL | {"torch_dtype": said})).dtype == dtype


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "a number is too large"),
        ('{"a": 1, "a": 2}', "has the key 'a' twice"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ('{"a": ' * 70 + "1" + "}" * 70, "nested deeper than 64"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "digits"),
    ],
)
def test_json_that_could_be_read_in_two_ways(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_model(write(tmp_path, text))


def test_a_file_of_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(json.dumps(MIXTRAL).encode("utf-16"))
    with pytest.raises(ConfigError, match="is not JSON"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(MIXTRAL).encode())
    assert read_model(tmp_path).experts == 8
