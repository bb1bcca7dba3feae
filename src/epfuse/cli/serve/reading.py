"""Reading a run's folder, with a progress bar if that takes its time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epfuse.serving.record import RunRecord


def read_run(folder: Path) -> RunRecord:
    """The record of a run.

    Raises:
        ConfigError: the folder has no run.
    """
    from epfuse.report.late_bar import LateBar
    from epfuse.serving.layout import RunFolder
    from epfuse.serving.record import collect

    with LateBar("reading points", in_bytes=False) as bar:
        return collect(RunFolder(folder), bar.update)
