"""A tiny MiniMax-M3 checkpoint in MXFP8, in the files and names that vLLM loads, with a byte-level tokenizer.

Every weight is random but the last: the output layer is solved, in closed form, so that the model recites `SENTENCES`.
The features that it is solved for go through the experts. So greedy decoding has answers with wide margins, which
rounding does not change, and which come out wrong when experts do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import MiniMaxM3VLForCausalLM, MiniMaxM3VLTextConfig

from epfuse.demo.model import model_config, round_experts_to_mxfp8, seed_weights
from epfuse.demo.settings import ModelSize
from epfuse.demo.text import VOCAB, encode
from epfuse.numerics.mxfp8 import MXFP8
from tests.integrations.vllm_e2e.tokenizer import save_tokenizer

SIZE = ModelSize(
    hidden=256, intermediate=128, dense_intermediate=256, dense_layers=1, moe_layers=2, experts=16, top_k=4
)
SENTENCES = (
    "Experts wait in line: half of them here, half of them there.",
    "A route that leaves this rank is summed by another one.",
)
"""What the model knows by heart."""
PROMPT = 12
"""Bytes of a sentence that are the prompt; the rest is the answer."""
LOGIT = 30.0
"""Logit of a right next byte; of the others, 0."""
COPIES = 8
NOISE = 0.02
"""The output layer is solved for this many readings of the text, whose inputs differ by this much: the wrong rounding
somewhere, or another expert where two are almost even, must not change an answer."""
RIDGE = 1e-3


@dataclass(frozen=True)
class Kind:
    """A model.

    Attributes:
        size: of its layers.
        heads, key_heads, head_dim: of the attention.
        positions: the longest text, tokens.
        recites: whether its output layer is solved; else it is random.
    """

    size: ModelSize = SIZE
    heads: int = 8
    key_heads: int = 2
    head_dim: int = 32
    positions: int = 512
    recites: bool = True


RECITING = Kind()


def text_config(kind: Kind = RECITING) -> MiniMaxM3VLTextConfig:
    """transformers' config, with dense attention in every layer: vLLM's sparse one has no CPU form."""
    config = model_config(kind.size)
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    config.max_position_embeddings = kind.positions
    config.num_attention_heads, config.num_key_value_heads = kind.heads, kind.key_heads
    config.head_dim, config.rotary_dim = kind.head_dim, kind.head_dim // 2
    return config


@torch.no_grad()
def build(kind: Kind = RECITING, seed: int = 1) -> nn.Module:
    """The model in transformers, float32, its experts at the numbers that MXFP8 holds and the rest at bfloat16's."""
    model: Any = MiniMaxM3VLForCausalLM._from_config(
        text_config(kind), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    model.requires_grad_(False).eval()
    seed_weights(model, seed)
    for weight in model.parameters():
        weight.copy_(weight.bfloat16())
    round_experts_to_mxfp8(model)
    if kind.recites:
        model.lm_head.weight.copy_(solve_output(model))
    return model


def solve_output(model: Any) -> torch.Tensor:
    """Output weights ``[VOCAB, H]`` with which every sentence's next byte has `LOGIT`: ridge regression."""
    generator = torch.Generator().manual_seed(0)
    features, targets = [], []
    for sentence in SENTENCES:
        ids = torch.tensor(encode(sentence.encode(), 1 + len(sentence)))
        read = model.model.embed_tokens(ids[:-1]).expand(COPIES, -1, -1)
        read = read * (1 + NOISE * torch.randn(read.shape, generator=generator))
        features.append(model.model(inputs_embeds=read, use_cache=False).last_hidden_state)
        targets.append(nn.functional.one_hot(ids[1:], VOCAB).expand(COPIES, -1, -1))
    x = torch.cat([part.flatten(0, 1) for part in features]).double()
    y = torch.cat([part.flatten(0, 1) for part in targets]).double() * LOGIT
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.T @ y).T


def checkpoint_tensors(model: nn.Module, kind: Kind = RECITING, mxfp8: bool = True) -> dict[str, torch.Tensor]:
    """The model's tensors under the names and in the formats of a MiniMax-M3 checkpoint.

    Args:
        model: by `build`.
        kind: what it was built from.
        mxfp8: the experts' format; else BF16, which holds the same numbers.
    """
    experts = _mxfp8 if mxfp8 else _bf16
    found: dict[str, torch.Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "rotary_emb" in name:
            continue
        name = name.replace(".mlp.", ".block_sparse_moe.") if _is_sparse(name, kind.size) else name
        if name.endswith("experts.gate_up_proj"):
            for expert, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                found |= experts(f"{name.removesuffix('gate_up_proj')}{expert}.w1", gate)
                found |= experts(f"{name.removesuffix('gate_up_proj')}{expert}.w3", up)
        elif name.endswith("experts.down_proj"):
            for expert, matrix in enumerate(tensor):
                found |= experts(f"{name.removesuffix('down_proj')}{expert}.w2", matrix)
        elif name.endswith("gate_up_proj.weight"):
            gate, up = tensor.bfloat16().chunk(2)
            found[name.replace("gate_up_proj", "gate_proj")] = gate
            found[name.replace("gate_up_proj", "up_proj")] = up
        elif name.endswith("gate.e_score_correction_bias"):
            found[name.replace("gate.e_score", "e_score")] = tensor.float()
        elif name.endswith("gate.weight"):
            found[name] = tensor.float()
        else:
            found[name] = tensor.bfloat16()
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _is_sparse(name: str, size: ModelSize) -> bool:
    parts = name.split(".")
    return parts[1] == "layers" and int(parts[2]) >= size.dense_layers


def _mxfp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    made = MXFP8.quantize(weight)
    return {f"{name}.weight": made.values, f"{name}.weight_scale_inv": made.scales}


def _bf16(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": weight.bfloat16()}


def vllm_config(kind: Kind = RECITING, mxfp8: bool = True) -> dict[str, Any]:
    """config.json, with vLLM's words."""
    config, size = text_config(kind), kind.size
    layers = config.num_hidden_layers
    quantized: dict[str, Any] = {
        "quantization_config": {
            "quant_method": "mxfp8",
            "ignored_layers": ["self_attn", "mlp", "shared_experts", "lm_head"],
        },
    }
    return {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "model_type": "minimax_m3_text",
        "dtype": "bfloat16",
        "vocab_size": VOCAB,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "shared_intermediate_size": size.intermediate,
        "dense_intermediate_size": size.dense_intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rotary_dim": config.rotary_dim,
        "partial_rotary_factor": 0.5,
        "rope_theta": 5_000_000.0,
        "max_position_embeddings": kind.positions,
        "num_local_experts": size.experts,
        "num_experts_per_tok": size.top_k,
        "routed_scaling_factor": config.routed_scaling_factor,
        "moe_layer_freq": [0] * size.dense_layers + [1] * size.moe_layers,
        "sparse_attention_config": {
            "sparse_attention_freq": [0] * layers,
            "sparse_num_index_heads": config.num_key_value_heads,
            "sparse_topk_blocks": 4,
        },
        "num_mtp_modules": 0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None,
    } | (quantized if mxfp8 else {})


def write_checkpoint(directory: Path, kind: Kind = RECITING) -> None:
    """Model, config and tokenizer."""
    write_model(directory, build(kind), kind)


def write_model(directory: Path, model: nn.Module, kind: Kind, mxfp8: bool = True) -> None:
    """Of a model that is built already."""
    save_file(checkpoint_tensors(model, kind, mxfp8), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(vllm_config(kind, mxfp8), indent=2))
    save_tokenizer(directory)
