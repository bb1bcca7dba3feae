"""Child processes that end when the process that started them ends, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from types import TracebackType

_LEADER = """
import os, signal
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
os.read(0, 1)
os.killpg(0, signal.SIGKILL)
"""


class Children:
    """A process group of this process's children and theirs, which is killed when the ``with`` block is left.

    The group's leader is a small process that does nothing but read a pipe. This process holds the other end, so when
    it is gone, even by SIGKILL, the leader reads the end of file and kills the group, stopped processes too. A process
    that makes a group of its own is no longer one of them.

    A terminal's Ctrl-C reaches this process alone, for the group is another than its own.

    Attributes:
        id: the group's id: for `join`, or for ``process_group=`` of `subprocess.Popen`.

    Raises:
        OSError: no process can be started.
    """

    def __init__(self) -> None:
        # Python, not a shell, and without site-packages: it starts in some 10 ms and needs no file of ours
        self._leader = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LEADER],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        self.id: int = self._leader.pid

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Kill all of the children; nothing happens the second time."""
        if self._leader.returncode is None:  # as long as nobody has waited for the leader, the id is nobody else's
            with suppress(ProcessLookupError):
                os.killpg(self.id, signal.SIGKILL)
            self._leader.wait()
        assert self._leader.stdin is not None
        self._leader.stdin.close()


def join(children: int) -> None:
    """Make the calling process a member of a group of children; it ends here if the group has ended already.

    Args:
        children: `Children.id` of the process that started this one.
    """
    try:
        os.setpgid(0, children)
    except OSError:  # the parent died while this process was starting
        os._exit(1)
