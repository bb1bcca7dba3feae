"""The expert layer whose kernels a trace has: from a preset or from a model's ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from epfuse.config import GPT_OSS_20B, GPT_OSS_120B, MINIMAX_M3, LayerShape
from epfuse.errors import ConfigError
from epfuse.profiling.text import printable
from epfuse.weights.model_config import read_layer

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
    "minimax-m3-ep8": ExpertShape(
        "MiniMax-M3, EP8", MINIMAX_M3.rank_of(ep_size=8), "bf16", "the preset: vLLM 0.33 on MI300X"
    ),
    "minimax-m3-tp8": ExpertShape(
        "MiniMax-M3, TP8", MINIMAX_M3.rank_of(tp_size=8), "bf16", "the preset: vLLM 0.33 on MI300X"
    ),
    "gpt-oss-20b": ExpertShape("gpt-oss-20b", GPT_OSS_20B, "mxfp4", "the checkpoint"),
    "gpt-oss-120b": ExpertShape("gpt-oss-120b", GPT_OSS_120B, "mxfp4", "the checkpoint"),
}


def read_config(path: Path, ep_size: int = 1, tp_size: int = 1) -> ExpertShape:
    """The expert shape of a Hugging Face ``config.json``.

    Args:
        path: the file; of a model around a language model the language model's config in it counts.
        ep_size: ranks that the experts are spread over.
        tp_size: ranks that each expert is sliced over.

    Raises:
        ConfigError: the file can't be read, or has no experts, or they don't divide.
    """
    name, layer, checkpoint = read_layer(path)
    weights = None if checkpoint is None else checkpoint.value
    try:
        share = layer.rank_of(ep_size, tp_size)
    except ConfigError as error:
        raise ConfigError(f"config {path}: {error}") from None
    return ExpertShape(printable(name)[:80], share, weights, "the config")
