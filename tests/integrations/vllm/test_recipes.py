"""vLLM's own parser reads the command of every point of every shipped recipe, with epfuse and without."""

from __future__ import annotations

import importlib
import importlib.util
from importlib import resources
from types import ModuleType

import pytest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from epfuse.serving.matrix import expand
from epfuse.serving.plan import jobs
from epfuse.serving.point import PointJob
from epfuse.serving.recipe import load_recipe, shipped_recipes

PLACES = ("vllm.entrypoints.common", "vllm.entrypoints.launchers", "vllm.entrypoints.openai")
"""Where releases keep `make_arg_parser` of ``vllm serve``, newest first."""


def cli_args() -> ModuleType:
    names = [f"{place}.cli_args" for place in PLACES if importlib.util.find_spec(place) is not None]
    return importlib.import_module(next(name for name in names if importlib.util.find_spec(name) is not None))


def served(name: str) -> list[PointJob]:
    recipe = load_recipe(name).recipe
    found = jobs(recipe, expand(recipe.matrix, recipe.runners), "run", arms=tuple(arm.name for arm in recipe.arms))
    return [job for job in found if job.arms[0].server.argv[:2] == ("vllm", "serve")]


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    return cli_args().make_arg_parser(FlexibleArgumentParser())


DEMOS = [str(path) for path in (resources.files("epfuse.serving") / "demos").iterdir() if path.name.endswith(".yaml")]


@pytest.mark.parametrize("name", [name for name in [*shipped_recipes(), *DEMOS] if served(name)])
def test_vllm_reads_every_command_of_a_shipped_recipe(parser: FlexibleArgumentParser, name: str) -> None:
    for words in sorted({arm.server.argv for job in served(name) for arm in job.arms}):
        parsed = parser.parse_args([word.replace("{port}", "8888") for word in words[2:]])
        cli_args().validate_parsed_serve_args(parsed)
        assert parsed.port == 8888
        assert parsed.enable_expert_parallel == ("--enable-expert-parallel" in words)
        assert str(parsed.max_model_len) == words[words.index("--max-model-len") + 1]


def test_a_word_that_vllm_does_not_know_is_found(parser: FlexibleArgumentParser) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["model", "--no-such-option-of-vllm"])
