"""Reading a run's folder, with a progress bar if that takes its time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epfuse.serving.record import RunRecord

QUIET_SECONDS = 2.0
"""A bar is shown from then on."""


def read_run(folder: Path) -> RunRecord:
    """The record of a run.

    Raises:
        ConfigError: the folder has no run.
    """
    from epfuse.report.terminal import bars
    from epfuse.serving.layout import RunFolder
    from epfuse.serving.record import collect

    began = time.monotonic()
    progress = bars()
    task = progress.add_task("reading points")
    try:

        def show(done: int, total: int) -> None:
            if time.monotonic() - began > QUIET_SECONDS:
                progress.start()
            progress.update(task, completed=done, total=total)

        return collect(RunFolder(folder), show)
    finally:
        progress.stop()
