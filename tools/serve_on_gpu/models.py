"""Folders that ``vllm serve`` takes with ``--load-format dummy``: config.json and a tokenizer, no weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epfuse.report.write import write_atomic

VOCAB = 8192
"""Words of the tokenizer, ``w0`` to ``w8191``."""


@dataclass(frozen=True)
class Model:
    """A model to serve.

    Attributes:
        config: its config.json.
        arguments: of ``vllm serve``, with and without epfuse.
        plugins: that vLLM needs for it, by their names.
    """

    config: Callable[[], dict[str, Any]]
    arguments: tuple[str, ...]
    plugins: tuple[str, ...] = ()


def minimax_m3(dense: int = 1, moe: int = 3, experts: int = 128) -> dict[str, Any]:
    """MiniMax-M3 of true width in MXFP8, with few layers and dense attention in all of them.

    Args:
        dense: layers without experts.
        moe: layers with them.
        experts: of a layer.
    """
    layers = dense + moe
    return {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "model_type": "minimax_m3_text",
        "dtype": "bfloat16",
        "vocab_size": VOCAB,
        "hidden_size": 6144,
        "intermediate_size": 3072,
        "shared_intermediate_size": 3072,
        "dense_intermediate_size": 12288,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "rotary_dim": 64,
        "partial_rotary_factor": 0.5,
        "rope_theta": 5e6,
        "max_position_embeddings": 524288,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.0,
        "moe_layer_freq": [0] * dense + [1] * moe,
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_index_dim": 128,
            "sparse_num_index_heads": 4,
            "sparse_topk_blocks": 16,
            "sparse_block_size": 128,
            "sparse_score_type": "max",
            "sparse_init_block": 0,
            "sparse_local_block": 1,
            "sparse_disable_index_value": [0] * dense + [1] * moe,
            "sparse_attention_freq": [0] * layers,
        },
        "num_mtp_modules": 0,
        "bos_token_id": 0,
        "eos_token_id": None,
        "quantization_config": {
            "quant_method": "mxfp8",
            "ignored_layers": ["self_attn", "mlp", "shared_experts", "lm_head"],
        },
    }


def qwen3_30b() -> dict[str, Any]:
    """Qwen3-30B-A3B with all its layers in BF16 (the published config.json), and this module's vocabulary."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "vocab_size": VOCAB,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": None,
    }


def gpt_oss_20b() -> dict[str, Any]:
    """gpt-oss-20b with all its layers in BF16 (the published config.json, no MXFP4), and this vocabulary."""
    layers = 24
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "dtype": "bfloat16",
        "vocab_size": VOCAB,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": layers,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "sliding_window": 128,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "experts_per_token": 4,
        "hidden_act": "silu",
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "initial_context_length": 4096,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": 1,
    }


_M3_ARGUMENTS = ("--block-size", "128", "--max-model-len", "4096")
_M3_PLUGINS = ("serve_on_gpu_m3",)
_ON_HOPPER = ("--attention-backend", "TRITON_ATTN", "--no-enable-prefix-caching", "--gpu-memory-utilization", "0.7")
_LONG = ("--max-model-len", "8192")
_MXFP8_EXPERTS = ("--quantization", "online", "--quantization-config", '{"moe": "mxfp8"}')
"""Quantised while loading; the linear layers stay BF16, with epfuse and without."""
MODELS = {
    "minimax-m3": Model(minimax_m3, (*_ON_HOPPER, *_M3_ARGUMENTS), _M3_PLUGINS),
    # For two GPUs of 140 GB or more. Experts: 15 layers of 128 x 3 x 3072 x 6144 numbers of 1 + 1/32 bytes, 112 GB; the
    # rest, in BF16, is 6 GB. So a rank has 59 GB of weights, and of 70 % of an H200's 150 GB 46 GB are left.
    "minimax-m3-16": Model(functools.partial(minimax_m3, dense=1, moe=15), (*_ON_HOPPER, *_M3_ARGUMENTS), _M3_PLUGINS),
    "gpt-oss-20b-bf16": Model(gpt_oss_20b, (*_ON_HOPPER, *_LONG)),
    # With epfuse alone: vLLM's Marlin, its choice without humming, takes no H that is no multiple of 128.
    "gpt-oss-20b-mxfp8": Model(gpt_oss_20b, (*_ON_HOPPER, *_LONG, *_MXFP8_EXPERTS)),
    "qwen3-30b-bf16": Model(qwen3_30b, (*_ON_HOPPER, *_LONG)),
    "qwen3-30b-mxfp8": Model(qwen3_30b, (*_ON_HOPPER, *_LONG, *_MXFP8_EXPERTS)),
}


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Make the folder: config.json, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="w0", clean_up_tokenization_spaces=False)
    fast.save_pretrained(folder)
    write_atomic(folder / "config.json", json.dumps(config, indent=1) + "\n")
