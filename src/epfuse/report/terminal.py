"""The look of a terminal: one console, one kind of table, one kind of progress bar for all commands.

What is computed is still written to where it can be when a reader leaves. Colour is rich's affair: there is none where
NO_COLOR is set or stdout is no terminal, and nothing is said by colour alone.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Sequence

import rich.console
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table


class Console(rich.console.Console):
    """Without rich's way of ending at a broken pipe: with exit code 1, and before files that come after are written."""

    def on_broken_pipe(self) -> None:
        """Progress that nobody reads is dropped; a result that nobody reads is an output that could not be written.

        Raises:
            BrokenPipeError: it is stdout.
        """
        if not self.stderr:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        self.quiet = True


def stdout(file_width: int) -> Console:
    """The results' console: as wide as the terminal, or ``file_width`` columns where it is a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else file_width)


def figures(name: str) -> Column:
    """A column of numbers: at the right, never broken."""
    return Column(name, justify="right", no_wrap=True)


def make_table(*columns: Column | str, title: str | None = None) -> Table:
    """A table; a column given by its name holds text, which takes more lines where the terminal is narrow."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        if isinstance(column, Column):
            table.add_column(column.header, justify=column.justify, no_wrap=column.no_wrap)
        else:
            table.add_column(column, overflow="fold")
    return table


def print_rows(
    console: rich.console.Console, title: str, columns: Iterable[Column | str], rows: Iterable[Sequence[str]]
) -> None:
    """A table of rows that are there already."""
    table = make_table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def in_parts(tiles: str) -> str:
    """A tile's key, ``block_m/gate_up/down``, with spaces: a narrow table breaks it there, and not inside a number."""
    return tiles.replace("/", " / ")


def bars(*, time_left: bool = False, console: Console | None = None) -> Progress:
    """Bars that are gone at the end: what runs, how much of it is done, and the time so far.

    Args:
        time_left: show the time that is left, too.
        console: where; None is stderr.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TimeRemainingColumn(),) if time_left else ()
    return Progress(*columns, *left, console=console or Console(stderr=True), transient=True)
