"""The expert layer whose kernels a trace has: from a preset or from a model's ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epfuse.config import MINIMAX_M3_EP8, LayerShape
from epfuse.errors import ConfigError
from epfuse.profiling.text import printable
from epfuse.weights.model_config import load_config, read_checkpoint

WEIGHT_BYTES = {"bf16": 2.0, "mxfp8": 1 + 1 / 32, "block_fp8": 1 + 4 / 128**2, "mxfp4": 0.5 + 1 / 32}
"""Format -> bytes of a weight in memory, scales included: one E8M0 byte per 32 values, one float per 128 x 128."""


@dataclass(frozen=True)
class ExpertShape:
    """One rank's share of a model's expert layers.

    Attributes:
        name: for people.
        layer: H, I (this rank's), E, L, K.
        weights: format in memory, a key of `WEIGHT_BYTES`; None if not known.
        weights_from: who says so.
    """

    name: str
    layer: LayerShape
    weights: str | None
    weights_from: str


SHAPES = {
    "minimax-m3-ep8": ExpertShape("MiniMax-M3, EP8", MINIMAX_M3_EP8, "bf16", "the preset: vLLM 0.33 on MI300X"),
    "minimax-m3-tp8": ExpertShape(
        "MiniMax-M3, TP8", LayerShape(6144, 384, 128, 128, 4), "bf16", "the preset: vLLM 0.33 on MI300X"
    ),
    "gpt-oss-20b": ExpertShape("gpt-oss-20b", LayerShape(2880, 2880, 32, 32, 4), "mxfp4", "the checkpoint"),
    "gpt-oss-120b": ExpertShape("gpt-oss-120b", LayerShape(2880, 2880, 128, 128, 4), "mxfp4", "the checkpoint"),
}
"""Sizes: transformers' MiniMaxM3VLTextConfig; the config.json of openai/gpt-oss-20b and openai/gpt-oss-120b."""

# One size, and the names that model families have for it; the first one that is there counts.
KEYS: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size",),
    "intermediate": ("moe_intermediate_size", "intermediate_size"),
    "experts": ("num_local_experts", "n_routed_experts", "num_experts"),
    "top_k": ("num_experts_per_tok", "experts_per_token", "moe_topk"),
}


def read_config(path: Path, ep_size: int = 1, tp_size: int = 1) -> ExpertShape:
    """The expert shape of a Hugging Face ``config.json``.

    Args:
        path: the file; a ``text_config`` inside is preferred.
        ep_size: ranks that the experts are spread over.
        tp_size: ranks that each expert is sliced over.

    Raises:
        ConfigError: the file can't be read, or has no experts, or they don't divide.
    """
    content = load_config(path)
    text = content.get("text_config")
    config = text if isinstance(text, dict) else content
    sizes = {name: _size(path, config, name, keys) for name, keys in KEYS.items()}
    for name, ranks in (("experts", ep_size), ("intermediate", tp_size)):
        if ranks < 1 or sizes[name] % ranks:
            raise ConfigError(f"{path}: {name} is {sizes[name]}; it must be a multiple of {ranks} ranks")
    layer = LayerShape(
        hidden=sizes["hidden"],
        intermediate=sizes["intermediate"] // tp_size,
        experts=sizes["experts"],
        local_experts=sizes["experts"] // ep_size,
        top_k=sizes["top_k"],
    ).with_distinct_experts()
    name = printable(str(content.get("model_type", path.name)))[:80]
    return ExpertShape(name, layer, _weights(path), "the config")


def _size(path: Path, config: dict[str, Any], name: str, keys: tuple[str, ...]) -> int:
    for key in keys:
        value = config.get(key)
        if value is not None:
            if type(value) is not int or not 1 <= value < 2**31:
                raise ConfigError(f"config {path}: {key} is {value!r:.40}; it must be a positive integer")
            return value
    raise ConfigError(f"config {path} has no {name} ({', '.join(keys)}); it must be that of a mixture of experts")


def _weights(path: Path) -> str | None:
    """What all that says it agrees on; None if it does not, or it is a format that epfuse does not read."""
    try:
        return read_checkpoint(path).value
    except ConfigError:
        return None
