"""A process that runs kernels of the peers' harness, one after another, and what it says as it ends."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from typing import Any

from epfuse.children import Children

LAST_LINES = 4
"""Of stderr, to say why a process ended: C++ says with what it was terminated in two."""


class PeerProcess:
    """A child that runs tools/peer_driver.py, until `end`.

    Args:
        phase: of the harness, ``compile`` or ``time``.
        environment: of the process.
    """

    def __init__(self, phase: str, environment: dict[str, str]) -> None:
        self._errors = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - `end` closes it
        self._before = 0
        self._children = Children()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.peer_driver", phase],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            errors="replace",  # of what a library prints, too
            process_group=self._children.id,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def give(self, task: dict[str, Any]) -> None:
        """Let it run a task; not before it has said ``END`` of the one before."""
        assert self._process.stdin is not None
        self._before = os.fstat(self._errors.fileno()).st_size
        with suppress(BrokenPipeError):  # it has ended, which its lines say
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()

    def line(self, seconds: float) -> str | None:
        """Its next line, None when it has ended.

        Raises:
            queue.Empty: it said nothing for so long.
        """
        return self._lines.get(timeout=max(0.0, seconds))

    def how_it_ended(self) -> str:
        """Its signal or exit code, and the last that it wrote to stderr since the task was given; waits for its end."""
        code = self._process.wait()
        if code < 0:
            names = {one.value: one.name for one in signal.Signals}
            how = names.get(-code, f"signal {-code}")
        else:
            how = f"exit code {code}"
        self._errors.seek(self._before)
        lines = [" ".join(line.split()) for line in self._errors.read().decode(errors="replace").splitlines()]
        said = " | ".join([line[:160] for line in lines if line][-LAST_LINES:])
        return f"its process ended, {how}: {said or 'nothing on stderr'}"

    def end(self) -> None:
        """Kill it and what it started; nothing happens the second time."""
        self._children.end()
        self._process.wait()
        self._thread.join()
        for stream in (self._process.stdout, self._errors):
            assert stream is not None
            stream.close()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
