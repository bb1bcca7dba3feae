"""Which layers of a model have experts: the ways in which families say it in their config.json."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from epfuse.weights.config_fields import Fields

MOST_LAYERS = 512
"""Layers of a model; the deepest known has 126."""
SPARSE = frozenset({"sparse", "moe", "hash_moe"})
"""Kinds of feed-forward layers that have experts."""
DENSE = frozenset({"dense"})

LayerRule = Callable[[Fields, int], tuple[int, ...]]
"""Of a config and the number of its layers: the indices of those that have experts, ascending."""


BLOCKS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
"""Kinds of Nemotron-H's layers, by the letters of ``hybrid_override_pattern``."""
OLDER_BLOCKS = frozenset({"mamba", "attention"})
"""Their names in older files; none of them has experts."""


def counted_layers(config: Fields) -> int:
    """How many layers there are."""
    return config.size("num_hidden_layers", most=MOST_LAYERS)


def every(config: Fields, layers: int) -> tuple[int, ...]:
    """All of them."""
    return tuple(range(layers))


def after_first(dense: int, key: str = "first_k_dense_replace") -> LayerRule:
    """All but the first ``key`` layers, ``dense`` where that is not said; every ``moe_layer_freq``-th of them."""

    def rule(config: Fields, layers: int) -> tuple[int, ...]:
        first = config.size(key, least=0, default=dense)
        step = 1 if isinstance(config.get("moe_layer_freq"), list) else config.size("moe_layer_freq", default=1)
        return tuple(layer for layer in range(min(first, layers), layers) if layer % step == 0)

    return rule


def listed(otherwise: LayerRule) -> LayerRule:
    """As a list with an entry a layer says; without a list as ``otherwise`` does."""

    def rule(config: Fields, layers: int) -> tuple[int, ...]:
        said = {
            key: found
            for key, found in (
                ("mlp_layer_types", _by_kind(config, layers)),
                ("moe_layer_freq", _by_flag(config, layers)),
                ("moe_layers_enum", _by_enumeration(config, layers)),
            )
            if found is not None
        }
        if len(set(said.values())) > 1:
            raise config.refuse(f"{' and '.join(said)} contradict each other about the layers that have experts")
        default = otherwise(config, layers)
        return next(iter(said.values()), default)

    return rule


def every_if(key: str) -> LayerRule:
    """All of them where ``key`` says that there are experts, else none."""
    return lambda config, layers: every(config, layers) if config.flag(key) else ()


def listed_blocks(config: Fields) -> int:
    """How many layers the list of their kinds has.

    Raises:
        ConfigError: there is no list, it is too long, or another number of layers is said.
    """
    layers = len(_blocks(config))
    if config.size("num_hidden_layers", most=MOST_LAYERS, default=layers) != layers:
        raise config.refuse(f"num_hidden_layers is {config.get('num_hidden_layers')}, and {layers} kinds are listed")
    return layers


def by_block_type(config: Fields, layers: int) -> tuple[int, ...]:
    """Those whose kind is "moe"."""
    return tuple(layer for layer, kind in enumerate(_blocks(config)) if kind == "moe")


def _blocks(config: Fields) -> list[str]:
    """The kind of every layer: ``layers_block_type``, or in older files a letter for each."""
    kinds, letters = config.array("layers_block_type", str, "kinds of layers"), config.text("hybrid_override_pattern")
    for key, found, known in (
        ("layers_block_type", kinds, {*BLOCKS.values(), *OLDER_BLOCKS}),
        ("hybrid_override_pattern", letters, BLOCKS),
    ):
        for kind in found or ():
            if kind not in known:
                raise config.refuse(f"{key} has {kind!r:.40}; known are {', '.join(sorted(known))}")
    if kinds is None and letters is None:
        raise config.refuse("neither layers_block_type nor hybrid_override_pattern is there")
    spelled = [BLOCKS[letter] for letter in letters or ""]
    if kinds is not None and letters is not None and _experts_at(kinds) != _experts_at(spelled):
        raise config.refuse("layers_block_type and hybrid_override_pattern contradict each other")
    blocks = spelled if kinds is None else kinds
    if not 1 <= len(blocks) <= MOST_LAYERS:
        raise config.refuse(f"{len(blocks)} kinds of layers are listed; there must be 1 to {MOST_LAYERS}")
    return blocks


def _experts_at(kinds: list[str]) -> list[bool]:
    return [kind == "moe" for kind in kinds]


def stepped(config: Fields, layers: int, dense: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Every ``decoder_sparse_step``-th layer but ``mlp_only_layers``, or ``dense`` where those are not listed."""
    step = config.size("decoder_sparse_step", default=1)
    listed_dense = config.array("mlp_only_layers", int, "layers")
    without = set(dense if listed_dense is None else listed_dense)
    return tuple(layer for layer in range(layers) if layer not in without and (layer + 1) % step == 0)


def ernie(config: Fields, layers: int) -> tuple[int, ...]:
    """Every ``moe_layer_interval``-th from ``moe_layer_start_index`` to ``moe_layer_end_index``, -1 for the last."""
    first = config.size("moe_layer_start_index", least=0, default=1)
    last = config.size("moe_layer_end_index", least=-1, default=-1)
    step = config.size("moe_layer_interval", default=1)
    end = layers if last == -1 else min(last + 1, layers)
    return tuple(layer for layer in range(min(first, layers), end) if (layer + 1) % step == 0)


def interleaved(config: Fields, layers: int) -> tuple[int, ...]:
    """Llama-4: ``moe_layers``, else every ``interleave_moe_layer_step``-th."""
    step = config.size("interleave_moe_layer_step", default=1)
    moe = config.array("moe_layers", int, "layers")
    if moe is not None:
        return _indices(config, "moe_layers", moe, layers, layers)
    return tuple(range(step - 1, layers, step))


def periodic(config: Fields, layers: int) -> tuple[int, ...]:
    """Jamba: the layers that leave ``expert_layer_offset`` when divided by ``expert_layer_period``."""
    period = config.size("expert_layer_period", default=2)
    offset = config.size("expert_layer_offset", least=0, default=1)
    return tuple(layer for layer in range(layers) if layer % period == offset)


def trimmed(config: Fields, key: str, entries: list[Any], layers: int) -> list[Any]:
    """A list with an entry a layer, without entries of layers for multi-token prediction that may follow.

    Raises:
        ConfigError: it has another length.
    """
    following = config.size("num_nextn_predict_layers", "num_mtp_layers", least=0, default=0)
    if len(entries) not in (layers, layers + following):
        raise config.refuse(f"{key} must be a list with {layers} entries, one a layer; it has {len(entries)}")
    return entries[:layers]


def _by_kind(config: Fields, layers: int) -> tuple[int, ...] | None:
    kinds = config.array("mlp_layer_types", str, "kinds of layers")
    if kinds is None:
        return None
    for kind in kinds:
        if kind not in SPARSE | DENSE:
            raise config.refuse(f"mlp_layer_types has {kind!r:.40}; known are {', '.join(sorted(SPARSE | DENSE))}")
    return tuple(i for i, kind in enumerate(trimmed(config, "mlp_layer_types", kinds, layers)) if kind in SPARSE)


def _by_flag(config: Fields, layers: int) -> tuple[int, ...] | None:
    if not isinstance(config.get("moe_layer_freq"), list):
        return None
    flags = config.get("moe_layer_freq")
    for flag in flags:
        if flag not in (0, 1) or isinstance(flag, float):
            raise config.refuse(f"moe_layer_freq has {flag!r:.40}; it must be 0 or 1 for each layer")
    return tuple(i for i, flag in enumerate(trimmed(config, "moe_layer_freq", flags, layers)) if flag)


def _by_enumeration(config: Fields, layers: int) -> tuple[int, ...] | None:
    """Step-3.5: indices in a list, or in a string with commas."""
    value = config.get("moe_layers_enum")
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,6}(\s*,\s*[0-9]{1,6})*\s*", value):
        value = [int(part) for part in value.split(",")]
    if not isinstance(value, list) or not all(type(entry) is int for entry in value):
        raise config.refuse(f"moe_layers_enum is {value!r:.40}; it must be a list of layers")
    following = config.size("num_nextn_predict_layers", "num_mtp_layers", least=0, default=0)
    return _indices(config, "moe_layers_enum", value, layers, layers + following)


def _indices(config: Fields, key: str, found: list[int], layers: int, end: int) -> tuple[int, ...]:
    """Each once, ascending, without those that follow the model's own layers; none may be beyond ``end``."""
    for layer in found:
        if not 0 <= layer < end:
            raise config.refuse(f"{key} has {layer!r:.40}, which is no layer of {layers}")
    return tuple(sorted({layer for layer in found if layer < layers}))
