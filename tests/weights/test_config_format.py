"""The experts' numbers: all that says it is read, what contradicts or is not read is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from epfuse.errors import ConfigError
from epfuse.weights.checkpoint_format import Checkpoint
from epfuse.weights.model_config import read_model
from tests.weights.test_model_config import M3_TEXT, MIXTRAL, MXFP8_GROUP, NEMOTRON_H, QWEN_FP8, groups, write

FP8 = QWEN_FP8["quantization_config"]
BLOCK_GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
}


def weights(**changes: Any) -> dict[str, Any]:
    return MXFP8_GROUP | {"weights": MXFP8_GROUP["weights"] | changes}


# what the config says -> what the experts have
READ: list[tuple[dict[str, Any], Checkpoint]] = [
    ({"quant_method": "mxfp8"}, Checkpoint.MXFP8),
    # MiniMax-M3's own list: "mlp" are its dense layers, its experts are in block_sparse_moe
    ({"quant_method": "mxfp8", "ignored_layers": ["self_attn", "mlp", "shared_experts", "lm_head"]}, Checkpoint.MXFP8),
    ({"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0", "fmt": "e4m3"}, Checkpoint.MXFP8),
    ({"quant_method": "mxfp8", "quant_algo": "MXFP8", "moe_quant_algo": "mxfp8"}, Checkpoint.MXFP8),
    ({"quant_method": "modelopt", "quant_algo": "MXFP8", "kv_cache_quant_algo": None}, Checkpoint.MXFP8),
    ({"quant_method": "modelopt_mxfp8", "quant_algo": "MXFP8", "exclude_modules": ["*self_attn*"]}, Checkpoint.MXFP8),
    ({"quantization": {"quant_algo": "MXFP8", "exclude_modules": []}, "producer": {"name": "x"}}, Checkpoint.MXFP8),
    (
        {
            "quant_method": "modelopt_mixed",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {
                "model.layers.*.block_sparse_moe.experts*": {"quant_algo": "MXFP8"},
                "lm_head": {"quant_algo": "FP8"},
            },
        },
        Checkpoint.MXFP8,
    ),
    (groups(group_0=MXFP8_GROUP), Checkpoint.MXFP8),
    (
        groups(group_0=MXFP8_GROUP) | {"format": "mxfp8-quantized", "ignore": ["lm_head", "re:.*self_attn.*"]},
        Checkpoint.MXFP8,
    ),
    (groups(group_0=weights(num_bits=4)), Checkpoint.MXFP4),
    (groups(group_0=BLOCK_GROUP), Checkpoint.BLOCK_FP8),
    (groups(group_0=MXFP8_GROUP | {"targets": [r"re:.*self_attn\.(q|k|v|o)_proj$"]}), Checkpoint.BF16),
    (groups(group_0=MXFP8_GROUP | {"targets": [r"re:.*experts\.\d+\.(w1|w2|w3)$"]}), Checkpoint.MXFP8),
    ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, Checkpoint.MXFP4),
    (FP8, Checkpoint.BLOCK_FP8),
    (FP8 | {"scale_fmt": "ue8m0"}, Checkpoint.BLOCK_FP8),  # DeepSeek-V3.1
    (FP8 | {"modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]}, Checkpoint.BLOCK_FP8),  # M2
    (FP8 | {"scale_fmt": "ue8m0", "expert_dtype": "fp4"}, Checkpoint.MXFP4),  # DeepSeek-V4
    (FP8 | {"modules_to_not_convert": ["block_sparse_moe.experts"]}, Checkpoint.BF16),
    (FP8 | {"modules_to_not_convert": ["experts"]}, Checkpoint.BF16),
    (FP8 | {"modules_to_not_convert": [f"model.layers.{i}.block_sparse_moe" for i in range(60)]}, Checkpoint.BF16),
    (groups(group_0=MXFP8_GROUP) | {"ignore": ["re:.*block_sparse_moe.*"]}, Checkpoint.BF16),
    # matrix by matrix, all of them
    (FP8 | {"modules_to_not_convert": ["gate_up_proj", "down_proj"]}, Checkpoint.BF16),
    (FP8 | {"modules_to_not_convert": [f"*experts.{name}" for name in ("gate_up_proj", "down_proj")]}, Checkpoint.BF16),
    (FP8 | {"modules_to_not_convert": [f"model.layers.*.{name}" for name in ("w1", "w2", "w3")]}, Checkpoint.BF16),
]


def by_matrix(*names: str, layers: range = range(3, 60), experts: range = range(128)) -> list[str]:
    return [
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
        for layer in layers
        for expert in experts
        for name in names
    ]


@pytest.mark.parametrize(("quantization", "checkpoint"), READ)
def test_what_is_read(tmp_path: Path, quantization: dict[str, Any], checkpoint: Checkpoint) -> None:
    assert read_model(write(tmp_path, M3_TEXT | {"quantization_config": quantization})).checkpoint is checkpoint


NAMED: list[tuple[Any, str]] = [
    ({"quant_method": "mxfp8", "moe_quant_algo": "NVFP4"}, "moe_quant_algo is 'NVFP4'"),
    ({"quant_method": "mxfp8", "quant_algo": "MXFP4"}, "quant_method mxfp8 says mxfp8, quant_algo MXFP4 says mxfp4"),
    ({"quant_method": "mxfp8", "weight_block_size": [128, 128]}, "weight_block_size is"),
    ({"quant_method": "mxfp8", "group_size": 16}, "group_size is 16"),
    ({"quant_method": "mxfp8", "bits": 4}, "bits is 4"),
    ({"quant_method": "mxfp8", "expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
    ({"quant_method": "mxfp8", "fmt": "e5m2"}, "fmt is 'e5m2'"),
    ({"quant_method": "mxfp8", "experts_bits": 4}, "experts_bits is 4, a field that is not understood"),
    ({"quant_method": "modelopt"}, "nothing says"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo is 'NVFP4'"),
    ({"quant_method": "modelopt", "quant_algo": "FP8", "moe_quant_algo": "MXFP8"}, "quant_algo is 'FP8'"),
    ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "needs quantized_layers"),
    (
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {"model.layers.3.block_sparse_moe.experts": {"quant_algo": "MXFP8"}},
        },
        "some layers only",
    ),
    ({"quant_method": "fp8"}, "weight_block_size is None"),
    (FP8 | {"weight_block_size": [64, 64]}, "weight_block_size is"),
    (FP8 | {"weight_block_size": [128.0, 128.0]}, "weight_block_size is"),
    (FP8 | {"activation_scheme": "static"}, "activation_scheme is 'static'"),
    (FP8 | {"expert_dtype": "fp4"}, "needs scale_fmt 'ue8m0'"),
    (FP8 | {"expert_dtype": "int8"}, "expert_dtype is 'int8'"),
    (FP8 | {"modules_to_not_convert": ["model.layers.7.block_sparse_moe"]}, "experts of layers 7 are not quantised"),
    (FP8 | {"modules_to_not_convert": ["model.layers.7.block_sparse_moe.experts.3"]}, "a part of a layer's experts"),
    (FP8 | {"modules_to_not_convert": ["model.layers.*.down_proj"]}, "a part of a layer's experts"),
    (FP8 | {"modules_to_not_convert": ["down_proj"]}, "'down_proj': a part of a layer's experts"),
    (FP8 | {"modules_to_not_convert": ["up_proj", "down_proj"]}, "a part of a layer's experts"),
    (FP8 | {"modules_to_not_convert": by_matrix("w1", "w2")}, "a part of a layer's experts"),
    (FP8 | {"modules_to_not_convert": by_matrix("w1", "w2", "w3", experts=range(127))}, "a part of a layer's experts"),
    (FP8 | {"modules_to_not_convert": by_matrix("w1", "w2", "w3", layers=range(3, 59))}, "are not quantised"),
    (FP8 | {"modules_to_not_convert": ["model.layers.*.experts.7.*"]}, "a part of a layer's experts"),
    (FP8 | {"modules_to_not_convert": ["model.layers.*.experts.[0-9].*"]}, "some of the experts' numbers"),
    (FP8 | {"modules_to_not_convert": ["*experts.?.*"]}, "a part of a layer's experts"),
    (FP8 | {"modules_to_not_convert": [f"*experts.{i}.*" for i in range(9)]}, "names experts by their numbers"),
    (groups(group_0=MXFP8_GROUP) | {"ignore": [r"re:.*experts\.\d\.w1$"]}, "some of the experts' numbers"),
    (FP8 | {"modules_to_not_convert": [3]}, "modules_to_not_convert has 3"),
    (FP8 | {"modules_to_not_convert": [f"*vision{i}" for i in range(300)]}, "has too many patterns"),
    (groups(group_0=MXFP8_GROUP) | {"ignore": ["re:(a+)+$"]}, "a regex that is not read"),
    (groups(group_0=MXFP8_GROUP) | {"ignore": ["re:^(?!.*experts).*"]}, "a regex that is not read"),
    (groups(group_0=weights(scale_dtype=None)), "scale_dtype None are not read"),
    (groups(group_0=weights(group_size=16, num_bits=4)), "num_bits 4"),
    (groups(group_0=weights(type="int")), "type 'int'"),
    (groups(group_0=MXFP8_GROUP | {"format": "nvfp4-pack-quantized"}), "format is 'nvfp4-pack-quantized'"),
    (groups(group_0=MXFP8_GROUP, group_1=BLOCK_GROUP), "contradict each other"),
    (groups(group_0=MXFP8_GROUP | {"targets": [r"re:.*layers\.3\..*"]}), "some layers only"),
    ({"quant_method": "compressed-tensors"}, "config_groups is not there"),
    ({}, "quantization_config is empty"),
    ({"quant_method": ["mxfp8"]}, "quant_method is"),
]


@pytest.mark.parametrize(("quantization", "words"), NAMED)
def test_what_is_named(tmp_path: Path, quantization: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_model(write(tmp_path, M3_TEXT | {"quantization_config": quantization}))


@pytest.mark.parametrize("names", [("w1", "w2", "w3"), ("down_proj", "gate_proj", "up_proj")])
def test_every_matrix_by_name(tmp_path: Path, names: tuple[str, ...]) -> None:
    named = FP8 | {"modules_to_not_convert": by_matrix(*names)}
    assert read_model(write(tmp_path, M3_TEXT | {"quantization_config": named})).checkpoint is Checkpoint.BF16


@pytest.mark.parametrize(
    ("ignored", "found"),
    [
        (["backbone.layers.4.mixer.in_proj", "*conv1d*", "lm_head"], Checkpoint.MXFP8),
        (["*.mixer.experts.*.up_proj", "*.mixer.experts.*.down_proj"], Checkpoint.BF16),
        ([r"re:.*mixer\.experts\.\d+\.(up|down)_proj$"], Checkpoint.BF16),
        (["up_proj", "down_proj"], Checkpoint.BF16),
        (["backbone.layers.*.mixer.experts.up_proj", "backbone.layers.*.mixer.experts.down_proj"], Checkpoint.BF16),
        (
            [
                f"backbone.layers.{layer}.mixer.experts.{expert}.{name}"
                for layer in (1, 3, 5)
                for expert in range(512)
                for name in ("up_proj", "down_proj")
            ],
            Checkpoint.BF16,
        ),
        (["*.mixer.experts.*.up_proj"], "a part of a layer's experts"),
        (["backbone.layers.1.mixer.experts.511.up_proj"], "a part of a layer's experts"),
        (["backbone.layers.1.mixer.experts"], "experts of layers 1 are not quantised"),
        (["*.mixer.experts.*.gate_up_proj", "*.mixer.experts.*.down_proj"], "a part of a layer's experts"),
    ],
    ids=lambda value: value[0][:40] if isinstance(value, list) else None,
)
def test_experts_without_a_gate_have_two_matrices(tmp_path: Path, ignored: list[str], found: Checkpoint | str) -> None:
    quantization = groups(group_0=MXFP8_GROUP) | {"ignore": ignored}
    path = write(tmp_path, NEMOTRON_H | {"quantization_config": quantization})
    if isinstance(found, Checkpoint):
        assert read_model(path).checkpoint is found
    else:
        with pytest.raises(ConfigError, match=found):
            read_model(path)


def test_two_quantisation_configs_must_say_the_same(tmp_path: Path) -> None:
    mxfp8, fp8 = {"quant_method": "mxfp8"}, FP8
    outer = {"model_type": "minimax_m3_vl", "text_config": M3_TEXT | {"quantization_config": mxfp8}}
    assert read_model(write(tmp_path, outer | {"quantization_config": mxfp8})).checkpoint is Checkpoint.MXFP8
    with pytest.raises(ConfigError, match="two quantisation configs that differ"):
        read_model(write(tmp_path, outer | {"quantization_config": fp8}))


def test_deepseek_v4_says_its_experts_beside_the_quantisation_config(tmp_path: Path) -> None:
    v4 = MIXTRAL | {
        "model_type": "deepseek_v4", "moe_intermediate_size": 2048, "expert_dtype": "fp4",
        "quantization_config": FP8 | {"scale_fmt": "ue8m0"},
    }  # fmt: skip
    assert read_model(write(tmp_path, v4)).checkpoint is Checkpoint.MXFP4
    del v4["quantization_config"]
    with pytest.raises(ConfigError, match="expert_dtype is 'fp4'"):
        read_model(write(tmp_path, v4 | {"model_type": "mixtral"}))


def test_modelopts_file_beside_the_config(tmp_path: Path) -> None:
    beside = tmp_path / "hf_quant_config.json"
    beside.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "MXFP8"}}))
    write(tmp_path, M3_TEXT)
    assert read_model(tmp_path).checkpoint is Checkpoint.MXFP8
    write(tmp_path, M3_TEXT | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "MXFP4"}})
    with pytest.raises(ConfigError, match="beside it says 'MXFP8'"):
        read_model(tmp_path)
    beside.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    write(tmp_path, M3_TEXT)
    with pytest.raises(ConfigError, match="quant_algo is 'NVFP4'"):
        read_model(tmp_path / "config.json")


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", ""])
@pytest.mark.parametrize(
    ("ends", "quantization", "words"),
    [
        (["weight"], None, None),
        (["weight", "weight_scale_inv"], {"quant_method": "mxfp8"}, None),
        (["weight", "weight_scale_inv"], None, "the config says bf16"),
        (["weight"], {"quant_method": "mxfp8"}, "have no scales, and the config says mxfp8"),
        (["weight", "weight_scale", "weight_scale_2"], {"quant_method": "mxfp8"}, "'weight_scale_2'"),
    ],
)
def test_names_of_weights(tmp_path: Path, prefix: str, ends: list[str], quantization: Any, words: str | None) -> None:
    write(tmp_path, M3_TEXT | {"quantization_config": quantization})
    names = [f"{prefix}layers.3.block_sparse_moe.experts.0.w1.{end}" for end in ends] + [
        "model.layers.0.mlp.w.weight_scale"
    ]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")}))
    if words is None:
        read_model(tmp_path)
    else:
        with pytest.raises(ConfigError, match=words):
            read_model(tmp_path)
