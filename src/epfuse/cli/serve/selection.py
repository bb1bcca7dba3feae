"""What ``plan`` and ``run`` have in common: a recipe, which of its points, which of its arms."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from epfuse.cli.names import Command, adds
from epfuse.errors import ConfigError

if TYPE_CHECKING:
    from epfuse.serving.matrix import MatrixRow, Selection
    from epfuse.serving.point import PointJob
    from epfuse.serving.recipe import LoadedRecipe

MOST_PAIRS = 100


def _words(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    return () if value is None else tuple(dict.fromkeys(word for word in value.split(",") if word))


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    if value is None:
        return ()
    if not re.fullmatch(r"[1-9][0-9]{0,6}(,[1-9][0-9]{0,6})*", value):
        raise click.BadParameter(f"{value[:40]!r} is no list of concurrencies such as 1,16,256")
    return tuple(dict.fromkeys(int(word) for word in value.split(",")))


OPTIONS = (
    click.argument("recipe", metavar="RECIPE", required=False),
    click.option(
        "--matrix",
        "masters",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Take the matrix from InferenceX' master file, not from the recipe; more than once for several.",
    ),
    click.option(
        "--six", is_flag=True, help="Only the recipe's few concurrencies: c1, c16 and c256 of the seed's six."
    ),
    click.option(
        "--key", "keys", callback=_words, metavar="GLOB,...", help="Keys of the matrix; * and ? stand for any."
    ),
    click.option("--prefix", "prefixes", callback=_words, metavar="TEXT,...", help="What keys begin with."),
    click.option("--precision", "precisions", callback=_words, metavar="NAME,...", help="As the matrix has them."),
    click.option("--framework", "frameworks", callback=_words, metavar="NAME,...", help="As the matrix has them."),
    click.option("--runner", "runners", callback=_words, metavar="NAME,...", help="Kinds of nodes."),
    click.option("--node", metavar="TEXT", help="Part of nodes' names; a row for each node."),
    click.option("--lengths", callback=_words, metavar="1k1k,...", help="Sequence lengths: 1k1k, 8k1k or ISL_OSL."),
    click.option("--conc", "concurrencies", callback=_numbers, metavar="N,...", help="Only these concurrencies."),
    click.option("--max-conc", type=int, metavar="N", help="No higher concurrency; one at N if all are higher."),
    click.option("--max-tp", type=int, metavar="N", help="Leave higher tp out."),
    click.option("--max-ep", type=int, metavar="N", help="Clamp ep."),
    click.option("--step", type=click.IntRange(2, 1000), default=2, show_default=True, help="Factor in a range."),
    click.option("--single-node", is_flag=True, help="Only entries of one node."),
    click.option("--multi-node", is_flag=True, help="Only entries of several nodes."),
    click.option("--sweep-runner", metavar="NAME", help="One cheap point on each node of this kind, no other."),
    click.option(
        "--evals",
        type=click.Choice(["with", "none", "only"]),
        default="with",
        show_default=True,
        help="lm-eval at the points that the rules choose.",
    ),
)

ARM_OPTIONS = (
    click.option("--arm", "arms", callback=_words, metavar="NAME,...", help="Arms to run once.  [default: the first]"),
    click.option(
        "--compare",
        "pairs",
        type=click.IntRange(1, MOST_PAIRS),
        metavar="PAIRS",
        help="Baseline against candidate in ABBA order, so many pairs a point; 8 allow a test without a distribution.",
    ),
)


selects: Callable[[Command], Command] = adds(OPTIONS)
"""Adds the options that choose rows; the command gets them as keyword arguments for `RecipeChoice`."""
selects_arms: Callable[[Command], Command] = adds(ARM_OPTIONS)
"""Adds the options that choose arms: ``arms`` and ``pairs``, for `RecipeChoice.jobs`."""


def _with_matrix(loaded: LoadedRecipe, masters: tuple[Path, ...]) -> LoadedRecipe:
    from epfuse.serving.inferencex import import_master
    from epfuse.serving.recipe import LoadedRecipe

    imported = import_master(masters)
    for sentence in imported.skipped:
        click.echo(f"epfuse: {sentence}", err=True)
    nodes = {entry.runner: (entry.runner,) for entry in imported.matrix.values()}
    changed = {"matrix": imported.matrix, "runners": nodes | loaded.recipe.runners}
    recipe = loaded.recipe.model_copy(update=changed)
    source = f"{loaded.source} with {', '.join(path.name for path in masters)}"
    digest = hashlib.sha256((loaded.sha256 + imported.sha256).encode()).hexdigest()
    return LoadedRecipe(recipe, source, digest)


@dataclass(frozen=True)
class RecipeChoice:
    """A recipe and the rows of it that the options leave."""

    loaded: LoadedRecipe
    rows: list[MatrixRow]

    @classmethod
    def of(
        cls,
        recipe: str | None,
        masters: tuple[Path, ...],
        six: bool,
        sweep_runner: str | None,
        evals: str,
        **selection: Any,
    ) -> RecipeChoice:
        """Read the recipe and expand it; what an imported matrix leaves out is said on stderr.

        Raises:
            ConfigError: it can't be used, or nothing is left of it.
        """
        if recipe is None:  # only `run --local-demo` goes without
            raise click.UsageError("Missing argument 'RECIPE'.")
        from epfuse.serving.matrix import Selection, expand, only_evals, sweep_runners, without_evals
        from epfuse.serving.recipe import load_recipe

        loaded = load_recipe(recipe)
        if masters:
            loaded = _with_matrix(loaded, masters)
        found = loaded.recipe
        if six:
            if selection["concurrencies"]:
                raise ConfigError("--six and --conc exclude each other")
            selection["concurrencies"] = found.six
        chosen: Selection = Selection(**selection)
        if sweep_runner is not None:
            rows = sweep_runners(found.matrix, found.runners, sweep_runner, chosen)
        else:
            rows = expand(found.matrix, found.runners, chosen)
        if evals != "with":
            rows = only_evals(rows) if evals == "only" else without_evals(rows)
        if not rows:
            raise ConfigError("the selection leaves no point of the matrix")
        return cls(loaded, rows)

    def jobs(self, run: str, arms: tuple[str, ...], pairs: int | None, profile: bool = False) -> list[PointJob]:
        """The jobs of the rows; `epfuse.serving.plan.jobs` says what is raised."""
        from epfuse.serving.plan import jobs

        if arms and pairs:
            raise ConfigError("--arm and --compare exclude each other")
        return jobs(self.loaded.recipe, self.rows, run, arms=arms, pairs=pairs or 0, profile=profile)
