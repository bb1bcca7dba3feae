"""docs/serving.md: its states, verdicts, recipes and figures are the code's."""

from __future__ import annotations

import pathlib
import re

from epfuse.serving.journal import PointState
from epfuse.serving.matrix import Selection, expand
from epfuse.serving.recipe import load_recipe, shipped_recipes
from epfuse.serving.verdict import FLIP_PAIRS, LEAST_PAIRS, Word
from tests.serving.test_verdict import POWER

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def test_every_state_has_a_row() -> None:
    section = TEXT.split("## What each state means")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.M) == [
        "planned", "submitting", "unknown", "queued", "starting", "warming", "running", "done", "gated_out", "failed",
        "cancelled",
    ]  # fmt: skip
    assert {state.value for state in PointState} == set(re.findall(r"^\| `(\w+)` \|", section, re.M))


def test_every_verdict_is_there() -> None:
    section = TEXT.split("| verdict | when |")[1].split("\n\n")[0]
    assert [word for word in Word if word not in section] == []
    assert f"with fewer than {FLIP_PAIRS}; or fewer than {LEAST_PAIRS} whole pairs" in section


def test_the_recipes_have_as_many_points_as_it_says() -> None:
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (\d+, with `--six` \d+) \|", TEXT, re.M))
    assert sorted(rows) == shipped_recipes()
    for name, words in rows.items():
        recipe = load_recipe(name).recipe
        six = expand(recipe.matrix, recipe.runners, Selection(concurrencies=recipe.six))
        assert words == f"{len(expand(recipe.matrix, recipe.runners))}, with `--six` {len(six)}"


def test_the_power_is_the_one_that_the_simulation_is_held_to() -> None:
    found = {
        int(row[0]): row[1:] for row in re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", TEXT, re.M)
    }
    for (pairs, noise), power in POWER.items():
        assert float(found[pairs][(0.01, 0.02, 0.05).index(noise)]) == power
