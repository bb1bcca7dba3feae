"""Whether processes are gone, for tests of what a killed parent leaves."""

from __future__ import annotations

import os
import time
from pathlib import Path


def pids_in(folder: Path, count: int, seconds: float = 60.0) -> list[int]:
    """The ids in the first ``count`` files ``pid-*`` that processes write there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = [text for path in folder.glob("pid-*") if (text := path.read_text())]
        if len(found) >= count:
            return [int(text) for text in found]
        time.sleep(0.02)
    raise AssertionError(f"{len(found)} of {count} processes have started in {seconds:g} s")


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    """Whether none of them runs, now or soon."""
    end = time.monotonic() + seconds
    while any(_runs(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # a zombie that nobody waits for, as where process 1 is no init, has ended too
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
