"""A tiny Mixtral checkpoint in BF16: experts that vLLM's own CPU kernels serve, and epfuse leaves to them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from epfuse.demo.text import BOS, VOCAB
from tests.integrations.vllm_e2e.tokenizer import save_tokenizer


def write_stock_checkpoint(directory: Path) -> None:
    """Model, config and tokenizer; weights from a seed."""
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=BOS,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MixtralForCausalLM(config).bfloat16().save_pretrained(directory)
    save_tokenizer(directory)
