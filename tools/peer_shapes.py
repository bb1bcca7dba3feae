"""What a rank of a known model holds, by a name such as ``deepseek-v3-ep16`` or ``glm-4.5-tp4``."""

from __future__ import annotations

import re

from epfuse.bench.layers import Layer
from epfuse.config import GPT_OSS_20B, GPT_OSS_120B, MINIMAX_M3, QWEN3_235B, LayerShape, SwiGLUOAI, silu_gate
from epfuse.errors import ConfigError

_SILU, _OAI = silu_gate(), SwiGLUOAI()
MODELS: dict[str, tuple[LayerShape, SwiGLUOAI]] = {
    "deepseek-v3": (LayerShape(7168, 2048, 256, 256, 8), _SILU),
    "kimi-k2": (LayerShape(7168, 2048, 384, 384, 8), _SILU),
    "glm-4.5": (LayerShape(5120, 1536, 160, 160, 8), _SILU),
    "qwen3-30b": (LayerShape(2048, 768, 128, 128, 8), _SILU),
    "qwen3-235b": (QWEN3_235B, _SILU),
    "mixtral-8x7b": (LayerShape(4096, 14336, 8, 8, 2), _SILU),
    "mixtral-8x22b": (LayerShape(6144, 16384, 8, 8, 2), _SILU),
    "gpt-oss-20b": (GPT_OSS_20B, _OAI),
    "gpt-oss-120b": (GPT_OSS_120B, _OAI),
    "minimax-m2": (LayerShape(3072, 1536, 256, 256, 8), _SILU),
    "minimax-m3": (MINIMAX_M3, _OAI),
}
"""Sizes as the models' config.json have them, gpt-oss without its biases."""

TWELVE = (
    "deepseek-v3-ep16", "deepseek-v3-tp8", "kimi-k2-ep32", "glm-4.5-ep16", "glm-4.5-tp4", "qwen3-30b-ep4",
    "qwen3-235b-ep8", "mixtral-8x7b-tp8", "mixtral-8x22b-ep8", "gpt-oss-120b-ep4", "minimax-m2-ep8", "minimax-m3-tp8",
)  # fmt: skip
"""Expert- and tensor-parallel ranks of models of all sizes; MiniMax-M3 under EP8 is timed apart, at more counts."""


def shard(name: str) -> Layer:
    """The layer of one rank.

    Raises:
        ConfigError: no model has that name, or so many ranks can't share it.
    """
    parts = re.fullmatch(r"(.+)-(ep|tp)([1-9]\d{0,3})", name)
    if parts is None or parts[1] not in MODELS:
        raise ConfigError(f"{name!r} is no rank such as minimax-m3-ep8, of {', '.join(MODELS)}")
    shape, activation = MODELS[parts[1]]
    return Layer(name, shape.rank_of(**{f"{parts[2]}_size": int(parts[3])}), activation)
