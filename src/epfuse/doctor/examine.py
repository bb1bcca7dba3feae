"""Runs checks in a child process with a limit each: one that crashes or hangs costs its own line."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from pydantic import ValidationError

from epfuse.children import Children
from epfuse.doctor.checks import Check
from epfuse.doctor.child import REPORT
from epfuse.doctor.finding import Finding, Verdict
from epfuse.doctor.redact import Redaction

_CHILD = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]);"
    "from epfuse.doctor.child import main; main(json.loads(sys.argv[2]))"
)
"""The child imports what this process would, not what lies in the folder that the command was started in."""


def examine(checks: Sequence[Check]) -> Iterator[Finding]:
    """One finding a check, in their order, as they come; without host names, paths of homes or tokens.

    Args:
        checks: what to look at.

    Raises:
        OSError: no process can be started.
    """
    redaction = Redaction.of_this_process()
    left, lost = list(checks), set[str]()
    while left:
        with _Child(_runnable(left, lost)) as child:
            for check in tuple(left):
                del left[0]
                found = _skipped(check, lost) or child.next(check)
                if isinstance(found, Finding):
                    yield redaction.of(found)
                else:
                    yield _unanswered(check, found)
                is_needed = any(check.name in other.needs for other in left)
                if isinstance(found, str) or (found.verdict is Verdict.BAD and is_needed):
                    lost.add(check.name)
                    break  # another child goes on, with what can still be looked at


def _runnable(checks: Sequence[Check], lost: set[str]) -> list[Check]:
    return [check for check in checks if not lost.intersection(check.needs)]


def _skipped(check: Check, lost: set[str]) -> Finding | None:
    missing = [name for name in check.needs if name in lost]
    if not missing:
        return None
    return Finding(
        name=check.name,
        verdict=Verdict.WARNING,
        found=f"not looked at: {missing[0]} is bad",
        fix=f"mend {missing[0]} first",
    )


def _unanswered(check: Check, how: str) -> Finding:
    return Finding(
        name=check.name,
        verdict=Verdict.BAD,
        found=f"the check {how}",
        fix=f"see whether the GPU's driver or a network file system hangs; else {REPORT}",
    )


class _Child:
    """One child and its lines."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self._children = Children()
        named = json.dumps([(check.name, check.look) for check in checks])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD, json.dumps(sys.path), named],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=self._children.id,
        )
        self._read = b""

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self._children.end()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.poll()  # not wait: a process inside a driver that hangs does not even die

    def next(self, check: Check) -> Finding | str:
        """The next check's finding, or how it ended without one."""
        line = self._line(time.monotonic() + check.seconds)
        if line is None:
            return f"was ended after {check.seconds:g} s"
        try:
            return Finding.model_validate_json(line)
        except ValidationError:  # the end of the file, in the middle of a line too
            return f"ended its process{self._death()}"

    def _line(self, end: float) -> bytes | None:
        """Up to the next line end, or all that came before the end of the file; None where time is up."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._read:
            ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            piece = os.read(pipe, 1 << 16)
            if not piece:
                break
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _death(self) -> str:
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            return ""
        return f" by {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"
