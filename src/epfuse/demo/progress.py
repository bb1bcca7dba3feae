"""A progress bar on stderr that also counts what the ranks, other processes, have finished."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from epfuse.report.terminal import Console, bars

POLL_SECONDS = 0.1


class StepFile:
    """A rank's step counter: a file that grows by one byte a step, which another process can read at any time.

    Args:
        folder: the run's step folder.
        rank: names the file.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path: Path = folder / f"rank-{rank}"

    def done(self) -> None:
        """Count one more step."""
        with self.path.open("ab") as file:
            file.write(b".")


class StepBar:
    """A progress bar over the launcher's steps and the ranks'.

    Args:
        total: steps in all.
        console: where to draw; None is stderr.
    """

    def __init__(self, total: int, console: Console | None = None) -> None:
        self._progress = bars(console=console)
        self._task = self._progress.add_task("starting", total=total)

    def __enter__(self) -> StepBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def next(self, description: str) -> None:
        """Name what begins now."""
        self._progress.update(self._task, description=description)

    def done(self) -> None:
        """Count one step of the launcher."""
        self._progress.advance(self._task)

    @property
    def completed(self) -> int:
        """Steps counted so far."""
        return int(self._progress.tasks[0].completed)

    @contextmanager
    def following(self, folder: Path) -> Iterator[None]:
        """Count the steps in ``folder``'s step files too, while the block runs."""
        stop = threading.Event()
        seen = 0

        def count() -> None:
            nonlocal seen
            now = sum(path.stat().st_size for path in folder.iterdir())
            self._progress.advance(self._task, now - seen)
            seen = now

        def poll() -> None:
            while not stop.wait(POLL_SECONDS):
                count()

        thread = threading.Thread(target=poll, name="epfuse-demo-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            count()
