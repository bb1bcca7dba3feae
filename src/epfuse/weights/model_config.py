"""What a Hugging Face ``config.json`` says about a model's experts: sizes, layers, activation, number format.

Only families whose experts are known to compute what `fused_experts` computes are understood; an unknown one is an
error, not a guess.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from epfuse.config import SwiGLUOAI, silu_gate
from epfuse.errors import ConfigError
from epfuse.weights.checkpoint_format import Checkpoint

LARGEST_CONFIG = 16 << 20
"""Bytes of a config.json."""


@dataclass(frozen=True)
class ExpertModel:
    """The experts of one model.

    Attributes:
        name: the model's type.
        hidden: H.
        intermediate: I.
        experts: E.
        top_k: K.
        layers: layers of the model, with and without experts.
        moe_layers: indices of those with experts, ascending.
        shared_experts: experts that every token visits besides its K.
        activation: between the two projections, in all layers but those of ``other_activations``.
        checkpoint: the numbers that the weights are stored in.
        has_bias: the projections have biases.
        weights_input: the router weight is applied to the experts' inputs, not to their outputs.
        other_activations: layers with an activation of their own, ascending, and what it is.
    """

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    layers: int
    moe_layers: tuple[int, ...]
    shared_experts: int
    activation: SwiGLUOAI
    checkpoint: Checkpoint
    has_bias: bool = False
    weights_input: bool = False
    other_activations: tuple[tuple[int, SwiGLUOAI], ...] = ()

    def activation_at(self, layer: int) -> SwiGLUOAI:
        """The activation of the experts in layer ``layer``."""
        return dict(self.other_activations).get(layer, self.activation)


MINIMAX_M3 = ExpertModel(
    name="minimax-m3",
    hidden=6144,
    intermediate=3072,
    experts=128,
    top_k=4,
    layers=60,
    moe_layers=tuple(range(3, 60)),
    shared_experts=1,
    activation=SwiGLUOAI(alpha=1.702, beta=1.0, limit=7.0),
    checkpoint=Checkpoint.MXFP8,
)
"""MiniMax-M3 in MXFP8: the defaults of transformers' MiniMaxM3VLTextConfig; its first three layers are dense."""

MODELS = {MINIMAX_M3.name: MINIMAX_M3}
"""Models that need no file."""

# One size, and the names that model families have for it; the first one that is there counts.
HIDDEN = ("hidden_size",)
LAYERS = ("num_hidden_layers",)
EXPERTS = ("num_local_experts", "num_experts")
TOP_K = ("num_experts_per_tok", "experts_per_token")


def read_model(source: Path) -> ExpertModel:
    """The experts of the model whose config.json is at ``source``.

    Args:
        source: the file; of a multimodal model the ``text_config`` in it is read.

    Raises:
        ConfigError: the file can't be read, is of a family that is not known, or a size is missing or no integer.
    """
    content = load_config(source)
    text = content.get("text_config")
    config: dict[str, Any] = text if isinstance(text, dict) else content
    quantization = config.get("quantization_config") or content.get("quantization_config")
    kind = str(config.get("model_type") or content.get("model_type"))
    if kind not in FAMILIES:
        raise ConfigError(f"config {source} is of a model of type {kind!r:.60}; known are {', '.join(FAMILIES)}")
    try:
        return FAMILIES[kind](kind, config, _checkpoint(quantization))
    except _Missing as error:
        raise ConfigError(f"config {source}: {error}") from None


class _Missing(Exception):
    """A value that is not there, or not what it must be."""


def load_config(source: Path) -> dict[str, Any]:
    """The object in a config.json that nobody has checked yet.

    Raises:
        ConfigError: it can't be read, is larger than LARGEST_CONFIG, or is not a JSON object.
    """
    try:
        with source.open("rb") as file:
            data = file.read(LARGEST_CONFIG + 1)
    except OSError as error:
        raise ConfigError(f"config {source} can't be read: {error.strerror or error}") from None
    if len(data) > LARGEST_CONFIG:
        raise ConfigError(f"config {source} has more than {LARGEST_CONFIG} bytes")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config {source} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"config {source} is a {type(content).__name__}; it must be an object")
    return content


def _size(config: Mapping[str, Any], *keys: str, least: int = 1, default: int | None = None) -> int:
    for key in keys:
        value = config.get(key)
        if value is not None:
            if type(value) is not int or not least <= value < 2**31:
                raise _Missing(f"{key} is {value!r:.40}; it must be an integer, at least {least}")
            return value
    if default is None:
        raise _Missing(f"none of {', '.join(keys)} is there")
    return default


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _Missing(f"{key} is {value!r:.40}; it must be a finite number")
    return float(value)


def _checkpoint(quantization: object) -> Checkpoint:
    if quantization is None:
        return Checkpoint.BF16
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    try:
        return Checkpoint(method)
    except ValueError:
        known = ", ".join(member.value for member in Checkpoint)
        raise _Missing(f"quantization_config has quant_method {method!r:.40}; it must be one of {known}") from None


def _indices(config: Mapping[str, Any], key: str, is_sparse: Callable[[object], bool]) -> tuple[int, ...] | None:
    """The layers for which a list with an entry a layer says that they have experts; None without that list."""
    entries = config.get(key)
    if entries is None:
        return None
    layers = _size(config, *LAYERS)
    if not isinstance(entries, list) or len(entries) != layers:
        raise _Missing(f"{key} must be a list with {layers} entries, one a layer")
    return tuple(index for index, entry in enumerate(entries) if is_sparse(entry))


def _model(
    kind: str,
    config: Mapping[str, Any],
    checkpoint: Checkpoint,
    activation: SwiGLUOAI,
    *,
    moe_layers: tuple[int, ...] | None = None,
    shared_experts: int = 0,
    width: tuple[str, ...] = ("intermediate_size",),
) -> ExpertModel:
    layers = _size(config, *LAYERS)
    found = tuple(range(layers)) if moe_layers is None else moe_layers
    if not found:
        raise _Missing("no layer has experts")
    model = ExpertModel(
        name=kind,
        hidden=_size(config, *HIDDEN),
        intermediate=_size(config, *width),
        experts=_size(config, *EXPERTS),
        top_k=_size(config, *TOP_K),
        layers=layers,
        moe_layers=found,
        shared_experts=shared_experts,
        activation=activation,
        checkpoint=checkpoint,
    )
    if model.top_k > model.experts:
        raise _Missing(f"{model.top_k} experts a token are more than the {model.experts} that there are")
    return model


def _clamped(config: Mapping[str, Any]) -> SwiGLUOAI:
    limit = _number(config, "swiglu_limit", 7.0)
    if limit <= 0:
        raise _Missing(f"swiglu_limit is {limit:g}; it must be positive")
    return SwiGLUOAI(alpha=_number(config, "swiglu_alpha", 1.702), limit=limit)


def _silu(config: Mapping[str, Any]) -> SwiGLUOAI:
    activation = config.get("hidden_act")
    if activation not in ("silu", "swish"):
        raise _Missing(f"hidden_act is {activation!r:.40}; it must be 'silu'")
    return silu_gate()


def _minimax_m3(kind: str, config: Mapping[str, Any], checkpoint: Checkpoint) -> ExpertModel:
    layers = _indices(config, "mlp_layer_types", lambda entry: entry == "sparse")
    if layers is None:
        layers = _indices(config, "moe_layer_freq", bool)
    shared = _size(config, "n_shared_experts", least=0, default=1)  # the model's code has one, whatever is said here
    return _model(kind, config, checkpoint, _clamped(config), moe_layers=layers, shared_experts=shared)


def _gpt_oss(kind: str, config: Mapping[str, Any], checkpoint: Checkpoint) -> ExpertModel:
    model = _model(kind, config, checkpoint, _clamped(config))
    return replace(model, has_bias=True)  # whatever the number format, in every checkpoint of the family


def _mixtral(kind: str, config: Mapping[str, Any], checkpoint: Checkpoint) -> ExpertModel:
    return _model(kind, config, checkpoint, _silu(config))


def _qwen(kind: str, config: Mapping[str, Any], checkpoint: Checkpoint) -> ExpertModel:
    step = _size(config, "decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise _Missing("mlp_only_layers must be a list of layers")
    layers = tuple(i for i in range(_size(config, *LAYERS)) if i not in dense and (i + 1) % step == 0)
    shared = 1 if config.get("shared_expert_intermediate_size") else 0
    return _model(
        kind,
        config,
        checkpoint,
        _silu(config),
        moe_layers=layers,
        shared_experts=shared,
        width=("moe_intermediate_size",),
    )


FAMILIES: dict[str, Callable[[str, Mapping[str, Any], Checkpoint], ExpertModel]] = {
    "minimax_m3_vl": _minimax_m3,
    "minimax_m3_vl_text": _minimax_m3,
    "gpt_oss": _gpt_oss,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen,
    "qwen3_moe": _qwen,
}
"""Model type -> how its config.json is read. Names and defaults: transformers' configuration classes."""
