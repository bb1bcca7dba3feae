"""Run apply or revert and be killed at a system call: ``python killed.py SITE ACTION CALL before|after``.

Exit code 0 means that the action ended before the call was reached.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from epfuse.integrations.vllm.patch import run
from epfuse.integrations.vllm.patch.site import find_site

CALLS = ("replace", "unlink", "fsync", "chmod", "close", "open")


def main() -> None:
    root, action, last, when = sys.argv[1:]
    site = find_site(Path(root))
    reached = 0

    def counted(call):
        def counting(*args, **kwargs):
            nonlocal reached
            reached += 1
            if reached == int(last) and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*args, **kwargs)
            finally:
                if reached == int(last):
                    os.kill(os.getpid(), signal.SIGKILL)

        return counting

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    getattr(run, action)(site)


if __name__ == "__main__":
    main()
