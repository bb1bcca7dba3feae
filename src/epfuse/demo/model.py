"""A small MiniMax-M3 text model from transformers' own classes, every architecture switch as in the real one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import MiniMaxM3VLForCausalLM, MiniMaxM3VLTextConfig

from epfuse.demo.settings import ModelSize
from epfuse.demo.text import BOS, VOCAB
from epfuse.numerics.mxfp8 import MXFP8

HEAD_DIM = 32
BLOCK = 32  # keys that the sparse attention keeps or drops together

# Standard deviation of each weight, times sqrt(fan-in): what it makes of inputs of unit size. Chosen so that experts'
# pre-activations pass the clamp at 7 now and then, experts weigh as much as the residual, and routing is spread.
GAINS = {
    "experts.gate_up_proj": 3.0,
    "experts.down_proj": 0.5,
    "mlp.gate.weight": 1.0,
    "embed_tokens.weight": math.sqrt(VOCAB),
    "lm_head.weight": 2.0,
}
BIAS_STD = 0.02


def model_config(size: ModelSize) -> Any:
    """The MiniMaxM3VLTextConfig of ``size``; what is not a size keeps transformers' MiniMax-M3 default."""
    layers = size.dense_layers + size.moe_layers
    return MiniMaxM3VLTextConfig(
        vocab_size=VOCAB,
        bos_token_id=BOS,
        eos_token_id=None,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        shared_intermediate_size=size.intermediate,
        dense_intermediate_size=size.dense_intermediate,
        num_local_experts=size.experts,
        num_experts_per_tok=size.top_k,
        num_hidden_layers=layers,
        mlp_layer_types=["dense"] * size.dense_layers + ["sparse"] * size.moe_layers,
        layer_types=["full_attention"] * size.dense_layers + ["minimax_m3_sparse"] * size.moe_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        rotary_dim=HEAD_DIM // 2,
        rope_parameters={"rope_type": "default", "rope_theta": 5_000_000.0, "partial_rotary_factor": 0.5},
        index_n_heads=2,
        index_head_dim=HEAD_DIM,
        index_block_size=BLOCK,
        index_topk_blocks=4,
    )


def build_model(size: ModelSize, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The model in eval mode with transformers' own plain attention and experts; on ``"meta"`` without weights."""
    with torch.device(device):
        model: nn.Module = MiniMaxM3VLForCausalLM._from_config(
            model_config(size), dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        )
    model.requires_grad_(False)
    return model.eval()


def seed_weights(model: nn.Module, seed: int) -> None:
    """Fill every weight, and the routers' correction bias, from ``seed``: the same numbers on every device and dtype.

    Norm weights stay zero, which is a scale of one in this model.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                gain = next((gain for suffix, gain in GAINS.items() if name.endswith(suffix)), 1.0)
                std = gain / math.sqrt(weight.shape[-1] if "embed" not in name else VOCAB)
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * BIAS_STD)


@torch.no_grad()
def round_experts_to_mxfp8(model: nn.Module) -> None:
    """Give every routed expert's weight the value that it has in MXFP8, in the model's own dtype, which holds it."""
    for name, weight in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            weight.copy_(MXFP8.quantize(weight).dequantize(torch.float32))
