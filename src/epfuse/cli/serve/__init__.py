"""``epfuse serve``: a group; each command is a file of its own, and imported when it runs."""

from __future__ import annotations

import click

from epfuse.cli.main import LazyGroup

COMMANDS = {
    "cancel": "End points of a run, and make sure that they have ended.",
    "export": "A run's results for other tools: InferenceX' aggregates, CSV.",
    "plan": "The points of a recipe, their commands and their environment, with epfuse and without.",
    "report": "A run as one page: throughput, latencies, comparisons with their intervals, gates, environment.",
    "resume": "Go on with a run whose dispatcher was interrupted or killed, from any machine that sees its folder.",
    "run": "Run the points of a recipe on this machine, by Slurm or over ssh; each ends exactly once.",
    "status": "Where the points of a run are.",
}
"""Command -> its line in the help; ``epfuse.cli.serve.NAME`` holds a click command of the same name."""


@click.group(cls=LazyGroup, package="epfuse.cli.serve", table=COMMANDS)
def serve() -> None:
    """Serving validation: each point of a matrix is run once, gated on accuracy, and reported; nothing is lost."""
