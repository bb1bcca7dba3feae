"""Models that need no file: what their published ``config.json`` says of the experts, under a short name.

`named_models.json` has the fields that `model_config` reads, and the repository whose ``config.json`` they are from;
`tests/weights/test_named_models.py` compares the sizes with the defaults of transformers' configuration classes where
those are the same model's.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from epfuse.errors import ConfigError
from epfuse.weights.model_config import (
    MINIMAX_M3,
    ExpertModel,
    model_of,
    quant_method_of,
    read_model,
    read_quant_method,
)


@dataclass(frozen=True)
class NamedModel:
    """A model with a name of its own.

    Attributes:
        model: its experts.
        source: where its config.json, or what stands for it, is published.
        quant_method: of its checkpoint, as its config.json names it; None for none.
    """

    model: ExpertModel
    source: str
    quant_method: str | None


@functools.cache
def named_models() -> dict[str, NamedModel]:
    """Every model that needs no file, by its name."""
    text = resources.files("epfuse.weights").joinpath("named_models.json").read_text(encoding="utf-8")
    found = {MINIMAX_M3.name: NamedModel(MINIMAX_M3, "transformers' MiniMaxM3VLTextConfig", "mxfp8")}
    for name, entry in json.loads(text).items():
        config = entry["config"]
        found[name] = NamedModel(model_of(config, name), entry["source"], quant_method_of(config, name))
    return found


def find_model(source: str) -> ExpertModel:
    """The experts of a named model, or of the ``config.json`` at that path.

    Raises:
        ConfigError: as of `read_model`; a word that is neither a name nor a path is answered with the names.
    """
    named = named_models().get(source)
    if named is not None:
        return named.model
    path = Path(source)
    if path.name == source and not path.exists() and not path.suffix:
        raise ConfigError(
            f"config is {source[:60]!r}, which is neither a file nor one of the names {', '.join(named_models())}"
        )
    return read_model(path)


def find_quant_method(source: str) -> str | None:
    """The name that the same model's config gives its quantisation; None for none.

    Raises:
        ConfigError: as of `read_quant_method`.
    """
    named = named_models().get(source)
    return read_quant_method(Path(source)) if named is None else named.quant_method
