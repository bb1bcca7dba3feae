from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from epfuse.demo.progress import StepBar, StepFile


def test_steps_of_other_processes_are_counted(tmp_path: Path) -> None:
    with StepBar(5, Console(file=io.StringIO())) as bar:
        bar.next("ranks")
        with bar.following(tmp_path):
            for rank in range(2):
                StepFile(tmp_path, rank).done()
                StepFile(tmp_path, rank).done()
        bar.done()
        assert bar.completed == 5
