"""What worker processes do in tests: module-level, so that another process finds it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import current_process
from multiprocessing.connection import Connection
from pathlib import Path

from epfuse.workers import Workers


def start() -> None:
    """Nothing to prepare."""


def job(number: int, how: str = "") -> int:
    if how.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[how])
    elif how == "raise":
        raise ValueError("enough")
    return number * number


def killed(*job: object) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def squares(answers: Connection) -> None:
    """Three jobs, and whether this process is a daemon."""
    with Workers(2, start) as workers:
        found = workers.map(job, [(number,) for number in range(3)], lambda done: None)
    answers.send((found, current_process().daemon))


def have_children(folder: Path, number: int) -> None:
    child = subprocess.Popen(["sleep", "600"])
    (folder / f"pid-{number}").write_text(str(os.getpid()))
    (folder / f"pid-of-child-{number}").write_text(str(child.pid))
    time.sleep(600)


if __name__ == "__main__":
    with Workers(2, start) as workers:
        workers.map(have_children, [(Path(sys.argv[1]), number) for number in range(2)], print)
