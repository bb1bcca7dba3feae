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
from epfuse.weights.model_config import MINIMAX_M3, ExpertModel, model_of, read_model


@dataclass(frozen=True)
class NamedModel:
    """A model with a name of its own.

    Attributes:
        model: its experts.
        source: where its config.json, or what stands for it, is published.
    """

    model: ExpertModel
    source: str


@functools.cache
def named_models() -> dict[str, NamedModel]:
    """Every model that needs no file, by its name."""
    text = resources.files("epfuse.weights").joinpath("named_models.json").read_text(encoding="utf-8")
    found = {MINIMAX_M3.name: NamedModel(MINIMAX_M3, "transformers' MiniMaxM3VLTextConfig")}
    for name, entry in json.loads(text).items():
        found[name] = NamedModel(model_of(entry["config"], name), entry["source"])
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
