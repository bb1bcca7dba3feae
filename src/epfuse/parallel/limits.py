"""What this machine lets ranks have, asked before anything is started."""

from __future__ import annotations

import os
import resource

from epfuse.errors import ConfigError

LAUNCHER_FILES_A_RANK = 2
"""multiprocessing's ends of two pipes."""
SPARE_FILES = 40
"""Python, torch and gloo, logs and model files: 13 were open in a rank beside its connections (torch 2.13, CPU)."""


def check_limits(ranks: int) -> None:
    """Refuse more ranks than the limit of open files allows; each rank is connected to every other one.

    Raises:
        ConfigError: what is needed, what is allowed, and how to change it.
    """
    launcher = _open_files() + LAUNCHER_FILES_A_RANK * ranks
    needed = max(launcher, ranks) + SPARE_FILES
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed != resource.RLIM_INFINITY and needed > allowed:
        raise ConfigError(
            f"ranks is {ranks}; that takes {needed} open files a process, and {allowed} are allowed:"
            f" ulimit -n {needed}, or fewer ranks"
        )


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 3
