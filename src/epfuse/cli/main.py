"""The ``epfuse`` command: finds a subcommand's module only when it is asked for, so that help needs no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

from epfuse import __version__
from epfuse.cli.exits import EXIT_CHECK_FAILED, EXIT_USAGE, PlainCommand
from epfuse.environment import environment
from epfuse.errors import MissingDependency

__all__ = ["COMMANDS", "EXIT_CHECK_FAILED", "EXIT_USAGE", "LazyGroup", "main"]

COMMANDS = {
    "aot": "Compile every kernel for a GPU that is not there: resources, gates, predictions.",
    "bench": "Every path beside its floor and other people's kernels: first checked, then timed.",
    "checkpoint": "Experts in Hugging Face folders: what one holds for each rank; a small one made for tests.",
    "demo": "A MiniMax-M3 model with its experts run by epfuse under expert parallelism, against the original.",
    "doctor": "What epfuse finds on this machine, what of it is wrong, and what mends it.",
    "place": "Which rank should hold which experts, from a measured load: imbalance before and after.",
    "plan": "What a policy would do with a model: storage, paths, tiles, bytes a rank, predicted times.",
    "profile": "Where a step's time goes, from a PyTorch profiler trace of a server.",
    "serve": "Serving validation: a matrix of points run on a node or by Slurm, gated on accuracy, reported.",
    "sglang": "What SGLang does with a model's experts, with epfuse and without, and whether the server starts.",
    "tune": "Search tiles for a layer's shape on this GPU; only results that are right count.",
    "verify": "The correctness suite on this machine's device, any shape, against a float64 oracle.",
    "vllm": "What vLLM does with a model's experts, with epfuse and without; the patch for images without plugins.",
    "warmup": "Compile a model's kernels ahead of time, without a GPU, into a folder for EPFUSE_KERNELS.",
}
"""Subcommand -> its line in the help; ``epfuse.cli.NAME`` holds a click command of the same name."""


class LazyGroup(PlainCommand, click.Group):
    """A group whose commands are imported when they run.

    Args:
        package: ``PACKAGE.NAME`` holds a click command of the same name.
        table: command -> its line in the help.
    """

    def __init__(self, *args: Any, package: str, table: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.package = package
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return None
        module = f"{self.package}.{cmd_name}"
        shown = f"{ctx.command_path} {cmd_name}"
        try:
            command = getattr(importlib.import_module(module), cmd_name)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise MissingDependency(
                    f"'{shown}' needs the package {error.name!r}, which is not installed"
                ) from error
            raise MissingDependency(f"'{shown}' is not part of this version ({__version__})") from error
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}.{cmd_name} is a {type(command).__name__}, not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.table[name]) for name in self.list_commands(ctx)])


@click.group(
    "epfuse",
    cls=LazyGroup,
    package="epfuse.cli",
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="epfuse")
@click.pass_context
def main(context: click.Context) -> None:
    """Routed experts of a mixture-of-experts model, on one expert-parallel rank.

    Exit codes: 0 good, 1 a check failed, 2 wrong usage, or input or an environment that can't be used (a result that
    could not be written too), 70 a bug of epfuse, 130 interrupted. Progress goes to stderr, results to stdout.
    """
    if context.invoked_subcommand != "doctor":  # which has a line for it
        environment()  # a wrong variable is refused before any work
