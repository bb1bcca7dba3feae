"""``epfuse serve run``."""

from __future__ import annotations

import re
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from epfuse.cli.serve.running import EXITS, Patience, dispatch, dispatches
from epfuse.cli.serve.selection import RecipeChoice, selects, selects_arms
from epfuse.errors import ConfigError

if TYPE_CHECKING:
    from epfuse.serving.layout import RunFolder

EPILOG = f"""\b
Examples:
  epfuse serve run minimaxm3-mi300x --six --launcher slurm --slurm partition=mi300x --out six
  epfuse serve run minimaxm3-h200 --conc 16 --compare 8 --launcher local
  epfuse serve run my.yaml --launcher ssh --host node1 --host node2
  epfuse serve run --local-demo --out serve-demo

{EXITS}"""

LONGEST_RUN = 60
DIGITS = "-0000"
DEMO = "transformers"
WITH_DEMO = {"local_demo", "name", "out", "poll", "attempts", "outage", "hopeless", "identical", "python", "as_json"}
"""What can be given with --local-demo: it has points, arms and a launcher of its own."""


def _settings(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if name not in ("partition", "account", "qos", "constraint", "nodelist", "gres") or not equals or not text:
            raise click.BadParameter(
                f"{value[:40]!r} is no NAME=VALUE of partition, account, qos, constraint, nodelist, gres"
            )
        found[name] = text
    return found


@click.command(epilog=EPILOG)
@selects
@selects_arms
@click.option("--profile", is_flag=True, help="A trace of each server, for epfuse profile.")
@click.option(
    "--launcher",
    type=click.Choice(["local", "slurm", "ssh"]),
    default="local",
    show_default=True,
    help="What starts the jobs: this machine one after the other, Slurm, or hosts without it.",
)
@click.option("--host", "hosts", multiple=True, metavar="HOST", help="Of --launcher ssh; can be given several times.")
@click.option(
    "--slurm",
    "slurm",
    multiple=True,
    callback=_settings,
    metavar="NAME=VALUE",
    help="For sbatch, in place of the recipe's: partition, account, qos, constraint, nodelist, gres.",
)
@click.option(
    "--canary/--no-canary",
    default=True,
    show_default=True,
    help="The cheapest point must end well before the others start.",
)
@click.option(
    "--name",
    metavar="NAME",
    help="Of the run; four digits are added, so that no two runs share keys.  [default: the recipe's, and the time]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="The run's folder, on a file system that the nodes see under the same path.  [default: its name]",
)
@click.option(
    "--local-demo",
    type=click.Choice([DEMO, "vllm"]),
    is_flag=False,
    flag_value=DEMO,
    help="No RECIPE: six scaled-down points and a comparison here, without a GPU, of a small model in transformers"
    " or, in a checkout, in vLLM's CPU build.",
)
@dispatches
def run(
    arms: tuple[str, ...],
    pairs: int | None,
    profile: bool,
    launcher: Literal["local", "slurm", "ssh"],
    hosts: tuple[str, ...],
    slurm: dict[str, str],
    canary: bool,
    name: str | None,
    out: Path | None,
    local_demo: Literal["transformers", "vllm"] | None,
    patience: Patience,
    **selection: Any,
) -> None:
    """Run the points of RECIPE, each of them once, and wait for their ends.

    RECIPE is a YAML file or the name of a shipped one: minimaxm3-mi300x, minimaxm3-h200. All that is known is in the
    run's folder: this command may be interrupted or killed at any time, and `epfuse serve resume` goes on.
    """
    from epfuse.serving.layout import RunFolder
    from epfuse.serving.plan import resolve
    from epfuse.serving.point import Slurm

    if hosts and launcher != "ssh":
        raise ConfigError(f"--host is for --launcher ssh; the launcher is {launcher}")
    if slurm and launcher != "slurm":
        raise ConfigError(f"--slurm is for --launcher slurm; the launcher is {launcher}")
    if local_demo is not None:
        dispatch(
            _demonstration(click.get_current_context(), local_demo, name, out),
            patience,
            lambda dispatcher: None,
            take_over=False,
        )
        return
    choice = RecipeChoice.of(**selection)
    called = _called(name, choice.loaded.recipe.name)
    jobs = choice.jobs(called, arms, pairs, profile)
    resolved = resolve(choice.loaded, jobs, launcher=launcher, hosts=hosts, canary=canary)
    resolved = resolved.model_copy(update={"slurm": Slurm(**(resolved.slurm.model_dump() | slurm))})
    folder = RunFolder((out or Path(called)).absolute())
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.create(resolved, jobs)
    click.echo(f"run {called}: {len(jobs)} points, in {folder.path}", err=True)
    dispatch(folder, patience, lambda dispatcher: None, take_over=False)


def _demonstration(
    context: click.Context, server: Literal["transformers", "vllm"], name: str | None, out: Path | None
) -> RunFolder:
    """The demonstration's run, made.

    Raises:
        ConfigError: an option that chooses what it has chosen already, or it can't be made here.
    """
    from epfuse.serving.local_demo import prepare

    given = {
        found
        for found in context.params
        if context.get_parameter_source(found) is ParameterSource.COMMANDLINE and found not in WITH_DEMO
    }
    if given:
        raise ConfigError(f"--local-demo has its own points and arms; leave {', '.join(sorted(given))} out")
    called = _called(name, "local-demo")
    folder = prepare((out or Path(called)).absolute(), server, called)
    run = folder.read_run()
    click.echo(f"run {called}: {len(run.points)} points, in {folder.path}; {run.label}", err=True)
    return folder


def _called(name: str | None, otherwise: str) -> str:
    """A run's name that no other run on a cluster has: jobs are found by keys, and these begin with it."""
    if name is None:
        return default_name(otherwise)
    longest = LONGEST_RUN - len(DIGITS)
    if not re.fullmatch(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", name) or len(name) > longest:
        raise ConfigError(f"--name is {name!r}; it must have at most {longest} of a-z, 0-9, '.', '_' and '-'")
    return f"{name}-{secrets.token_hex(2)}"


def default_name(recipe: str) -> str:
    """A run's name that no other run on a cluster has: keys begin with it."""
    made = f"-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
    return recipe[: LONGEST_RUN - len(made)].rstrip("._-") + made
