"""Other programs, run without a shell, within a time, with their answer whole."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

LARGEST_ANSWER = 16 << 20
"""Characters of an answer that are looked at."""


@dataclass(frozen=True)
class Reply:
    """How a program ended.

    Attributes:
        code: its exit code; negative for a signal; None where it was still running when its time was up, and killed.
        out: what it wrote to stdout.
        err: what it wrote to stderr.
    """

    code: int | None
    out: str
    err: str

    @property
    def words(self) -> str:
        """One line for people: what it complained of, or how it ended."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        ended = "it did not answer in time" if self.code is None else f"exit code {self.code}"
        return f"{'; '.join(lines[-3:])[:400]} ({ended})" if lines else ended


def run(
    argv: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None, said: str | None = None
) -> Reply:
    """Run a program and wait for it, but not longer than ``seconds``; then it and its children are killed.

    Args:
        argv: the program and its arguments.
        seconds: of patience.
        environment: all of its variables; None for ours.
        said: what it reads on stdin.

    Raises:
        OSError: it can't be started.
    """
    process = subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL if said is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=None if environment is None else dict(environment),
        text=True,
        encoding="utf-8",
        errors="replace",
        process_group=0,  # Ctrl-C is for the dispatcher: an sbatch that it interrupts would leave a doubt
    )
    try:
        out, err = process.communicate(said, timeout=seconds)
        return Reply(process.returncode, out[:LARGEST_ANSWER], err[:LARGEST_ANSWER])
    except subprocess.TimeoutExpired:
        _kill(process)
        out, err = process.communicate()
        return Reply(None, out[:LARGEST_ANSWER], err[:LARGEST_ANSWER])
    except BaseException:
        _kill(process)
        process.wait()
        raise


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
