"""What a Hugging Face ``config.json`` says about a model's experts: sizes, layers, activation, number format.

Only families whose experts are known are understood (`config_families`); an unknown one is an error, not a guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from epfuse.arguments import checks_enums
from epfuse.config import MINIMAX_M3 as MINIMAX_M3_SHAPE
from epfuse.config import Activation, Bias, LayerShape, SwiGLUOAI
from epfuse.errors import ConfigError
from epfuse.input_file import read_object
from epfuse.weights.checkpoint_format import Checkpoint
from epfuse.weights.config_families import (
    EXPERTS,
    FAMILIES,
    NESTED,
    ONLY_WIDTH,
    OUTER,
    OWN_WIDTH,
    TOP_K,
    UNPLANNED,
    ModelFamily,
    relu2,
)
from epfuse.weights.config_fields import Fields
from epfuse.weights.config_format import experts_format
from epfuse.weights.config_layers import MOST_LAYERS
from epfuse.weights.config_modules import ExpertModules
from epfuse.weights.weight_names import check_names

CONFIG = "config.json"
MODELOPT = "hf_quant_config.json"
"""Where ModelOpt writes the quantisation, besides or in place of config.json's ``quantization_config``."""
UNREAD = re.compile(
    r"swiglu|zero_expert|expert_dtype|moe_latent|moe_hidden|clamp_limit|(expert|moe)\w*(quant|bits|dtype)"
)
"""Fields that change what experts compute or how they are stored; one that a family does not have is refused."""
DTYPES = {"bfloat16": "bfloat16", "float32": "bfloat16", "float16": "float16"}
"""dtype of a checkpoint -> of the activations that it is served with."""


@checks_enums
@dataclass(frozen=True)
class ExpertModel:
    """The experts of one model.

    Attributes:
        name: the language model's type.
        hidden: H of the experts.
        intermediate: I.
        experts: E.
        top_k: K.
        layers: layers of the model, with and without experts.
        moe_layers: indices of those with experts, ascending.
        shared_experts: experts that every token visits besides its K.
        activation: between the two projections, in all layers that ``other_activations`` does not name.
        checkpoint: the numbers that the weights are stored in.
        has_bias: the projections have biases.
        weights_input: the router weight is applied to the experts' inputs, not to their outputs.
        other_activations: layers with an activation of their own, ascending, and what it is; None for one that epfuse
            does not compute.
        dtype: of the activations, as torch names it.
        beside: I of further groups of experts that each of the layers has, for tokens of another kind (images); all
            else is as in the first.
    """

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    layers: int
    moe_layers: tuple[int, ...]
    shared_experts: int
    activation: Activation
    checkpoint: Checkpoint
    has_bias: bool = False
    weights_input: bool = False
    other_activations: tuple[tuple[int, Activation | None], ...] = ()
    dtype: str = "bfloat16"
    beside: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[ExpertModel, ...]:
        """Each group of experts as a model of its own; the first one's tokens are text."""
        alone = replace(self, beside=())
        return (alone, *(replace(alone, intermediate=width) for width in self.beside))

    @property
    def bias(self) -> Bias:
        """Of both projections or none."""
        return Bias.ADDED if self.has_bias else Bias.NONE

    def activation_at(self, layer: int) -> Activation | None:
        """The activation of the experts in layer ``layer``; None for one that epfuse does not compute."""
        return dict(self.other_activations).get(layer, self.activation)


MINIMAX_M3 = ExpertModel(
    name="minimax-m3",
    hidden=MINIMAX_M3_SHAPE.hidden,
    intermediate=MINIMAX_M3_SHAPE.intermediate,
    experts=MINIMAX_M3_SHAPE.experts,
    top_k=MINIMAX_M3_SHAPE.top_k,
    layers=60,
    moe_layers=tuple(range(3, 60)),
    shared_experts=1,
    activation=SwiGLUOAI(alpha=1.702, beta=1.0, limit=7.0),
    checkpoint=Checkpoint.MXFP8,
)
"""MiniMax-M3 in MXFP8: the defaults of transformers' MiniMaxM3VLTextConfig; its first three layers are dense."""


def read_model(source: Path) -> ExpertModel:
    """The experts of the model whose config.json is at ``source``.

    Args:
        source: the file, or the folder that has it. Of a model around a language model the language model's config in
            it is read. What lies beside a file of that name, ModelOpt's config and the names of the weights, is
            compared with it.

    Raises:
        ConfigError: the file can't be read, is of a family that is not known, a value is missing or not what it must
            be, or values contradict each other.
    """
    path = source / CONFIG if source.is_dir() else source
    return _read(Fields(load_config(path), f"config {path}"), path.parent if path.name == CONFIG else None)


def model_of(content: dict[str, Any], name: str) -> ExpertModel:
    """The experts of the model that ``content``, a config.json's object, describes.

    Args:
        content: as of `load_config`; unchecked.
        name: for messages.

    Raises:
        ConfigError: as of `read_model`.
    """
    return _read(Fields(content, f"config {name}"), None)


def read_quant_method(source: Path) -> str | None:
    """The name that a model's files give its quantisation, from which servers choose their code; None without one.

    Args:
        source: as of `read_model`.

    Raises:
        ConfigError: a file can't be read, or the name is no string.
    """
    path = source / CONFIG if source.is_dir() else source
    return _quant_method(Fields(load_config(path), f"config {path}"), path.parent if path.name == CONFIG else None)


def quant_method_of(content: dict[str, Any], name: str) -> str | None:
    """As `read_quant_method`, of an object as of `model_of`."""
    return _quant_method(Fields(content, f"config {name}"), None)


def _quant_method(content: Fields, folder: Path | None) -> str | None:
    quantization = _quantization(content, _innermost(content)[1], folder)
    if quantization is None:
        return None
    return quantization.text("quant_method") or "modelopt"  # whose own file has no such field


def _read(content: Fields, folder: Path | None) -> ExpertModel:
    kind, config = _language_model(content)
    family = FAMILIES[kind]
    model, modules = _sizes(kind, config, family)
    quantization = _quantization(content, config, folder)
    checkpoint = experts_format(quantization, modules)
    if folder is not None:
        check_names(folder, checkpoint, family.module)
    for fields in {id(content): content, id(config): config}.values():
        for key, value in fields.unread():
            if UNREAD.search(key) and not isinstance(value, dict):
                raise fields.refuse(f"{key} is {value!r:.40}, which {kind} is not known to have and which could matter")
    return replace(model, checkpoint=checkpoint, dtype=_dtype(content, config))


def read_layer(path: Path) -> tuple[str, LayerShape, Checkpoint | None]:
    """A model's type, its layer of experts as one rank holds it, and their numbers, of a model of any family.

    Args:
        path: of the file; nothing beside it is read, and all of the model's layers are taken to have experts.

    Returns:
        The numbers are None where what says them is not understood or contradicts itself.

    Raises:
        ConfigError: the file can't be read, or a size is missing, out of range or contradicts another.
    """
    content = Fields(load_config(path), f"config {path}")
    kind, config = _innermost(content)
    family = FAMILIES.get(kind or "")
    experts = config.size(*EXPERTS)
    if family is not None:
        hidden, width = family.hidden(config), config.size(*family.width)
    else:
        hidden = config.size("hidden_size")
        width = config.size(*(OWN_WIDTH if config.get(OWN_WIDTH[0]) is not None else ONLY_WIDTH))
    shape = LayerShape(hidden, width, experts, experts, config.size(*TOP_K))
    try:
        layers = config.size("num_hidden_layers", most=MOST_LAYERS, default=1)
        read = ModelFamily() if family is None else family
        modules = ExpertModules(tuple(range(layers)), read.module, experts, read.activation is not relu2)
        checkpoint = experts_format(_quantization(content, config, None), modules)
    except ConfigError:
        checkpoint = None
    return content.text("model_type") or path.name, shape.with_distinct_experts(), checkpoint


def load_config(source: Path) -> dict[str, Any]:
    """The object in a config.json that nobody has checked yet.

    Raises:
        ConfigError: it can't be read, is too large, or is not a JSON object.
    """
    return read_object(source, "config")


def _language_model(content: Fields) -> tuple[str, Fields]:
    """The language model's type and its config."""
    kind, config = _innermost(content)
    for fields in {id(content): content, id(config): config}.values():
        _one_model(fields)
    if kind not in FAMILIES:
        for name in (kind, content.text("model_type")):
            if (why := UNPLANNED.get((name or "").removesuffix("_text"))) is not None:
                raise content.refuse(f"it is of a model of type {name!r}, for which no plan is made: {why}")
        raise content.refuse(f"it is of a model of type {kind!r:.60}; known are {', '.join(FAMILIES)}")
    return kind, config


def _innermost(content: Fields) -> tuple[str | None, Fields]:
    """The language model's type and its config: that inside, if there is one.

    Where the type inside is missing or unknown, that of a known model around a language model says it.
    """
    outer, config = content.text("model_type"), content
    kind = outer
    for _ in range(3):  # qwen3_omni_moe: thinker_config, text_config
        inner = [found for key in NESTED for found in [config.child(key)] if found is not None]
        if len(inner) > 1:
            raise content.refuse(f"there are several of {', '.join(NESTED)}; one language model is planned")
        if not inner:
            break
        config = inner[0]
        kind = config.text("model_type")
    kind = OUTER.get(kind or "", kind)
    return kind if kind in FAMILIES else OUTER.get(outer or "", kind), config


def _one_model(content: Fields) -> None:
    """Refuse experts in other parts, such as a vision tower: bytes would not be counted."""
    parts = [(key, value) for key, value in content.items() if key not in (*NESTED, "quantization_config")]
    for _ in range(3):
        inner = [(key, value) for key, value in parts if isinstance(value, dict)]
        for key, value in inner:
            if any(type(value.get(size)) is int and value[size] > 1 for size in EXPERTS):
                raise content.refuse(f"{key} has experts of its own; a plan counts the language model's alone")
        parts = [(f"{key}.{name}", part) for key, value in inner for name, part in value.items()]


def _sizes(kind: str, config: Fields, family: ModelFamily) -> tuple[ExpertModel, ExpertModules]:
    layers = family.count(config)
    moe_layers = family.layers(config, layers)
    if not moe_layers:
        raise config.refuse("no layer has experts")
    activation, others = family.activation(config, layers)
    width, *beside = family.widths(config)
    input_flags = [config.flag(key) for key in ("apply_router_weight_on_input", "moe_apply_router_weight_on_input")]
    model = ExpertModel(
        name=kind,
        hidden=family.hidden(config),
        intermediate=width,
        experts=config.size(*EXPERTS),
        top_k=config.size(*TOP_K),
        layers=layers,
        moe_layers=moe_layers,
        shared_experts=family.shared(config),
        activation=activation,
        checkpoint=Checkpoint.BF16,
        has_bias=family.has_bias,
        weights_input=family.weights_input or any(input_flags),
        other_activations=tuple((layer, others[layer]) for layer in moe_layers if layer in others),
        beside=tuple(beside),
    )
    if model.top_k > model.experts:
        raise config.refuse(f"{model.top_k} experts a token are more than the {model.experts} that there are")
    return model, ExpertModules(moe_layers, family.module, model.experts, activation.inputs == 2)


def _quantization(content: Fields, config: Fields, folder: Path | None) -> Fields | None:
    """The one quantisation config that the files have; ModelOpt's own file counts where config.json has none."""
    found = []
    for fields in (content,) if config is content else (content, config):
        for key in ("quantization_config", "compression_config"):
            said = fields.child(key)
            if said is not None and next(said.items(), None) is not None:
                found.append(said)
            elif said is not None:
                raise fields.refuse(f"{key} is empty")
    if any(not each.same_as(found[0]) for each in found):
        raise content.refuse("there are two quantisation configs that differ")
    expert_dtype = config.text("expert_dtype")
    if expert_dtype is not None:  # DeepSeek-V4 says it beside the quantisation config, V4.1 in it
        if not found:
            raise config.refuse(f"expert_dtype is {expert_dtype!r:.40}, and there is no quantization_config")
        found[0] = found[0].with_value("expert_dtype", expert_dtype)
    if folder is not None and (folder / MODELOPT).exists():
        beside = Fields(read_object(folder / MODELOPT, "config"), f"config {folder / MODELOPT}")
        if not found:
            return beside
        own, other = _algorithm_of(found[0]), _algorithm_of(beside)
        if own != other:
            raise content.refuse(f"quant_algo is {own!r:.40}, and {MODELOPT} beside it says {other!r:.40}")
    return found[0] if found else None


def _algorithm_of(quantization: Fields) -> str | None:
    inner = quantization.child("quantization")
    return (quantization if inner is None else inner).text("quant_algo")


def _dtype(content: Fields, config: Fields) -> str:
    for fields in (config, content):
        for key in ("dtype", "torch_dtype"):
            name = fields.text(key)
            if name in (None, "auto"):
                continue
            found = DTYPES.get(str(name).removeprefix("torch."))
            if found is None:
                raise fields.refuse(f"{key} is {name!r:.40}; it must be one of {', '.join(DTYPES)}")
            return found
    return "bfloat16"
