"""``epfuse checkpoint``: a group; each command is a file of its own, and imported when it runs."""

from __future__ import annotations

import click

from epfuse.cli.main import LazyGroup

COMMANDS = {
    "inspect": "What a Hugging Face folder holds for each rank: format, layout, bytes, and what would run it.",
    "make": "Write a small checkpoint with seeded weights, in a real one's names, formats and files.",
}
"""Command -> its line in the help; ``epfuse.cli.checkpoint.NAME`` holds a click command of the same name."""


@click.group(cls=LazyGroup, package="epfuse.cli.checkpoint", table=COMMANDS)
def checkpoint() -> None:
    """Experts in Hugging Face folders: config.json and safetensors files. Nothing is downloaded."""
