"""Models that need no file: sizes as transformers has them, and an answer for a word that is no name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from epfuse.errors import ConfigError
from epfuse.weights.model_config import MINIMAX_M3, read_model
from epfuse.weights.named_models import find_model, named_models

DEFAULTS = {
    "deepseek-v3": "deepseek_v3",
    "deepseek-v3.2": "deepseek_v32",
    "ernie-4.5-21b-a3b": "ernie4_5_moe",
    "glm-4.5-air": "glm4_moe",
    "glm-5": "glm_moe_dsa",
    "gpt-oss-120b": "gpt_oss",
    "kimi-linear-48b-a3b": "kimi_linear",
    "llama-4-scout": "llama4_text",
    "minimax-m2": "minimax_m2",
    "mixtral-8x7b": "mixtral",
    "phi-3.5-moe": "phimoe",
    "qwen1.5-moe-a2.7b": "qwen2_moe",
    "qwen3-next-80b-a3b": "qwen3_next",
    "qwen3.5-35b-a3b": "qwen3_5_moe_text",
}
"""Name -> type whose configuration class has this very model as its defaults."""
SAME = ("hidden", "intermediate", "experts", "top_k", "layers", "moe_layers", "activation", "has_bias")


def test_there_are_thirty_and_more() -> None:
    assert len(named_models()) >= 30
    assert named_models()["minimax-m3"].model is MINIMAX_M3
    assert all(named.source for named in named_models().values())
    assert set(DEFAULTS) <= set(named_models())


@pytest.mark.parametrize("name", DEFAULTS)
def test_sizes_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    config = auto.CONFIG_MAPPING[DEFAULTS[name]]().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    theirs, ours = read_model(tmp_path), named_models()[name].model
    assert {key: getattr(ours, key) for key in SAME} == {key: getattr(theirs, key) for key in SAME}


def test_a_name_a_file_and_neither(tmp_path: Path) -> None:
    assert find_model("minimax-m3") is MINIMAX_M3
    with pytest.raises(ConfigError, match="neither a file nor one of the names minimax-m3, gpt-oss-120b"):
        find_model("gpt-oss-12b")
    with pytest.raises(ConfigError, match="can't be read"):
        find_model(str(tmp_path / "nothing.json"))
