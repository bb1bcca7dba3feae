"""A command that runs beside a server to its end: the load, the evals, the patch."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path

from epfuse.children import Children
from epfuse.serving.environments import Task
from epfuse.serving.load import LoadFault

ENDING_PATIENCE = 60.0
"""Seconds that an engine may take to remove a container."""


def run_client(task: Task, log: Path, what: str, look: Callable[[], None], interval: float) -> None:
    """Run a command; whatever ends it, nothing of it is left.

    Args:
        task: the command.
        log: its stdout and stderr are appended there.
        what: it is, for messages.
        look: called at intervals, and once after its end; it raises if there is nothing more to wait for.
        interval: seconds.

    Raises:
        LoadFault: it can't be started, or ends with another exit code than 0.
    """
    try:
        with log.open("ab") as out, Children() as children:
            try:
                process = subprocess.Popen(
                    task.argv,
                    env=task.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    process_group=children.id,
                )
            except OSError as error:
                raise LoadFault(f"{what}: {task.argv[0]} can't be started: {error.strerror or error}") from None
            while (code := _wait(process, interval)) is None:
                look()
            look()  # a server that died is why its client failed
    finally:
        if task.ending:
            with contextlib.suppress(OSError, subprocess.SubprocessError):  # the client's own end is what counts
                subprocess.run(
                    task.ending, stdin=subprocess.DEVNULL, capture_output=True, timeout=ENDING_PATIENCE, check=False
                )
    if code:
        with log.open("rb") as said:
            said.seek(max(0, said.seek(0, 2) - 4096))
            tail = said.read().decode(errors="replace").strip()[-500:]
        raise LoadFault(f"{what}: {task.argv[0]} ended with exit code {code}: {tail}")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
