"""A progress bar for work that nobody knows to be long: it shows after two seconds, on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from epfuse.report.terminal import Console

PATIENCE = 2.0
"""Seconds without a bar."""


@contextmanager
def late_bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A function to be told of bytes that are done.

    Args:
        title: what is being done.
        total: bytes; None where nobody knows.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    progress = Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task(title, total=total)
    begin = time.monotonic()
    shows = False

    def advance(nbytes: int) -> None:
        nonlocal shows
        progress.update(task, advance=nbytes)
        if not shows and time.monotonic() - begin > PATIENCE:
            progress.start()
            shows = True

    try:
        yield advance
    finally:
        if shows:
            progress.stop()
