"""``epfuse serve``: a group; each command is a file of its own, and imported when it runs."""

from __future__ import annotations

import click

from epfuse.cli.main import LazyGroup

COMMANDS = {
    "export": "A run's results for other tools: InferenceX' aggregates, CSV.",
    "plan": "The points of a recipe, their commands and their environment, with epfuse and without.",
    "report": "A run as one page: throughput, latencies, comparisons with their intervals, gates, environment.",
}
"""Command -> its line in the help; ``epfuse.cli.serve.NAME`` holds a click command of the same name."""


@click.group(cls=LazyGroup, package="epfuse.cli.serve", table=COMMANDS)
def serve() -> None:
    """Serving validation: each point of a matrix is run once, gated on accuracy, and reported; nothing is lost."""
