"""Run apply or revert in a process that is killed at a system call."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from epfuse.integrations.vllm.patch import run
from epfuse.integrations.vllm.patch.site import find_site

CALLS = ("replace", "unlink", "fsync", "chmod", "close", "open", "symlink")


def killed_at(call: int, root: Path, action: str) -> bool:
    """Fork, and let the child be killed before its ``call``-th system call, which is after the one before.

    Returns:
        Whether it was; False if the action ended before that call.
    """
    child = os.fork()
    if not child:
        code = 1
        try:
            _act(call, root, action)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


def _act(last: int, root: Path, action: str) -> None:
    reached = 0

    def counted(call):
        def counting(*args, **kwargs):
            nonlocal reached
            reached += 1
            if reached == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counting

    site = find_site(root)
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    getattr(run, action)(site)
