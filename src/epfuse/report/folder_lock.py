"""A lock on a directory: one process at a time, no file left; an error names who holds it. It ends with the process."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from epfuse.errors import ConfigError

log: logging.Logger = logging.getLogger("epfuse.lock")

PATIENCE = 60.0
"""Seconds that another process may hold the lock; what is done under one takes milliseconds."""
SILENCE = 1.0
"""Seconds of waiting before a line says so."""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock.

    Raises:
        ConfigError: another process holds it longer than PATIENCE.
        OSError: the directory can't be opened.
    """
    import fcntl  # here, so that other commands' help works where there is none

    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        begin, is_said = time.monotonic(), False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = time.monotonic() - begin
            if waited >= PATIENCE:
                raise ConfigError(
                    f"{holder(descriptor)} holds the lock on {directory} for {waited:.0f} seconds; end it, or wait"
                ) from None
            if waited >= SILENCE and not is_said:
                log.warning("epfuse: waiting for %s, which holds the lock on %s", holder(descriptor), directory)
                is_said = True
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def holder(descriptor: int) -> str:
    """Who locked an open file, from what Linux says; "another process" where that can't be known."""
    status = os.fstat(descriptor)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()  # 1: FLOCK ADVISORY WRITE pid device:inode start end; waiting ones begin with 1: ->
            if "->" not in words and words[1] == "FLOCK" and words[5] == place and int(words[4]) > 0:
                command = Path(f"/proc/{words[4]}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                return f"process {words[4]} ({command.strip():.80})"
    return "another process"
