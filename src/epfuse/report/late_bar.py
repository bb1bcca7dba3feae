"""A progress bar for work that nobody knows to be long: it shows after two seconds, on stderr."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from epfuse.report.terminal import Console

PATIENCE = 2.0
"""Seconds without a bar."""


class LateBar:
    """A bar; to be used as a context manager, and told what is done.

    Args:
        title: what is being done.
        total: how much there is; None where nobody knows.
        in_bytes: whether that is counted in bytes.
    """

    def __init__(self, title: str, total: int | None = None, *, in_bytes: bool) -> None:
        text = TextColumn("{task.description}", markup=False)
        amounts: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),)
        if in_bytes:
            amounts = (DownloadColumn(), TransferSpeedColumn())
        columns = (text, BarColumn(), *amounts, TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(title, total=total)
        self._began = time.monotonic()
        self._shows = False

    def __enter__(self) -> LateBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shows:
            self._progress.stop()

    def advance(self, amount: int) -> None:
        """So much more is done."""
        self._progress.advance(self._task, amount)
        self._show()

    def update(self, done: int, total: int) -> None:
        """So much is done in all, of so much."""
        self._progress.update(self._task, completed=done, total=total)
        self._show()

    def _show(self) -> None:
        late = time.monotonic() - self._began > PATIENCE
        if late and not self._shows and self._progress.console.is_terminal:
            self._progress.start()
            self._shows = True
