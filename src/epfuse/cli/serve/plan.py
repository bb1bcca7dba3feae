"""``epfuse serve plan``."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import click

from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.cli.serve.selection import RecipeChoice, selects
from epfuse.report.terminal import figures, make_table, stdout

if TYPE_CHECKING:
    from epfuse.serving.matrix import MatrixRow
    from epfuse.serving.point import PointJob

EPILOG = """\b
Examples:
  epfuse serve plan minimaxm3-mi300x --six
  epfuse serve plan minimaxm3-mi300x --lengths 8k1k --max-conc 64 --json | jq '.points[].name'
  epfuse serve plan minimaxm3-mi300x --matrix amd-master.yaml --key 'minimaxm3-*' --runner mi300x
  epfuse serve plan my.yaml --key 'minimaxm3-*' --evals only

\b
Exit status: 0 good, 2 a recipe or a selection that can't be used; 130 interrupted.
"""


@click.command(epilog=EPILOG)
@selects
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def plan(as_json: bool, **options: Any) -> None:
    """Show the points of RECIPE, their commands and their environment, with epfuse and without.

    RECIPE is a YAML file or the name of a shipped one: minimaxm3-mi300x, minimaxm3-h200. Nothing is started.
    """
    choice = RecipeChoice.of(**options)
    several = [row for row in choice.rows if row.tp is None]
    single = RecipeChoice(choice.loaded, [row for row in choice.rows if row.tp is not None])
    arms = tuple(arm.name for arm in choice.loaded.recipe.arms)
    jobs = single.jobs("plan", arms, None) if single.rows else []
    delivery = Delivery()
    with delivery.of(STDOUT):
        if as_json:
            click.echo(json.dumps(_record(choice, jobs, several), indent=2))
        else:
            _show(choice, jobs, several)
    delivery.exit(passed=True)


def _record(choice: RecipeChoice, jobs: list[PointJob], several: list[MatrixRow]) -> dict[str, Any]:
    from epfuse.serving.plan import point_environment

    recipe = choice.loaded.recipe
    return {
        "recipe": {"name": recipe.name, "source": choice.loaded.source, "sha256": choice.loaded.sha256},
        "points": [
            job.point.model_dump(mode="json")
            | {
                "max_model_len": job.point.max_model_len,
                "gpus": job.gpus,
                "node": job.node,
                "environment": point_environment(job.point, job.client),
                "client": job.client.model_dump(mode="json"),
                "arms": [arm.model_dump(mode="json") for arm in job.arms],
            }
            for job in jobs
        ],
        "multi_node": [{"key": row.key, "name": row.name, "isl": row.isl, "osl": row.osl, "conc": row.conc,
                        "node": row.node} for row in several],
    }  # fmt: skip


def _show(choice: RecipeChoice, jobs: list[PointJob], several: list[MatrixRow]) -> None:
    console = stdout(200)
    recipe = choice.loaded.recipe

    def say(line: str) -> None:
        console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)

    say(f"{recipe.name}: {recipe.about.strip()}")
    table = make_table("point", *map(figures, ("GPUs", "max len", "requests")), "evals")
    for job in jobs:
        evals = ", ".join(job.gate.evals) + (" only" if job.point.eval_only else "") if job.point.is_eval else ""
        table.add_row(job.point.name, *map(str, (job.gpus, job.point.max_model_len, job.client.prompts)), evals)
    if jobs:
        console.print(table)
    for left in several:
        say(f"{left.key}: {left.name} needs several nodes; epfuse serve run takes none of these")
    for (common, own, words), names in _commands(jobs).items():
        say(f"\n{', '.join(names)}:")
        for line in (common, *own, *words):
            say(f"  {line}")


Commands = tuple[str, tuple[str, ...], tuple[str, ...]]


def _commands(jobs: list[PointJob]) -> dict[Commands, list[str]]:
    """The environment that arms share, what each has of its own, and their commands -> the points that have these."""
    found: dict[Commands, list[str]] = {}
    for job in jobs:
        settings = [[f"{name}={shlex.quote(text)}" for name, text in arm.server.env.items()] for arm in job.arms]
        common = [setting for setting in settings[0] if all(setting in others for others in settings)]
        own = tuple(
            f"{arm.name}: {' '.join(setting for setting in its if setting not in common)}"
            for arm, its in zip(job.arms, settings, strict=True)
        )
        arms: dict[str, list[str]] = {}
        for arm in job.arms:
            arms.setdefault(shlex.join(arm.server.argv), []).append(arm.name)
        words = tuple(arms) if len(arms) == 1 else tuple(f"{', '.join(of)}: {line}" for line, of in arms.items())
        found.setdefault((" ".join(common), own, words), []).append(job.point.name)
    return found
