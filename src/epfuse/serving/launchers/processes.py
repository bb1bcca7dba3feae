"""Jobs as processes of this machine: each in a session of its own, found again by its command line.

``python -m epfuse.serving.launchers.processes start|look|stop`` does the same for a dispatcher on another machine
(`epfuse.serving.launchers.ssh`); what it says is one JSON object.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

NAMED_SECONDS = 5.0
"""What a process that has been started may take to have its own command line."""
STOP_SECONDS = 20.0
"""What a job may take to stop its server after SIGTERM; SIGKILL follows."""


def start(key: str, folder: Path, argv: Sequence[str]) -> int:
    """Start a job that outlives this process; or find it, if it runs already.

    Args:
        key: the attempt; one of ``argv``, so that the process can be found.
        folder: the attempt's, for ``job.log``.
        argv: the job's command.

    Returns:
        Its process id.

    Raises:
        OSError: it can't be started.
    """
    with _alone(folder):
        if found := running(key):
            return found[0]
        with open(folder / "job.log", "ab") as log:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _CHILDREN[process.pid] = process
        _until_named(process, key)
        return process.pid


def _until_named(process: subprocess.Popen[bytes], key: str) -> None:
    """Wait, a moment, for its command line: until the system has written it, the next start would not find the job."""
    end = time.monotonic() + NAMED_SECONDS
    while process.poll() is None and process.pid not in running(key) and time.monotonic() < end:
        time.sleep(0.002)


_CHILDREN: dict[int, subprocess.Popen[bytes]] = {}
"""Of this process: to be waited for, or they stay as zombies."""


def running(key: str) -> list[int]:
    """Ids of this machine's jobs of an attempt: leaders of a session that have ``--key KEY`` in their command line."""
    for pid, process in list(_CHILDREN.items()):
        if process.poll() is not None:
            del _CHILDREN[pid]
    return sorted(pid for pid, session, words in _processes() if pid == session and _names(words, key))


def stop(key: str, seconds: float = STOP_SECONDS) -> None:
    """End an attempt's jobs: SIGTERM to the job, and after ``seconds`` SIGKILL to all of its session."""
    leaders = running(key)
    for pid in leaders:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + seconds
    while running(key) and time.monotonic() < end:
        time.sleep(0.05)
    for pid, session, _ in list(_processes()):
        if session in leaders:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _names(words: list[str], key: str) -> bool:
    return any(words[at : at + 2] == ["--key", key] for at in range(len(words)))


def _processes() -> Iterator[tuple[int, int, list[str]]]:
    """Id, session and command line of what runs here; without zombies."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError, ValueError, IndexError):
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] not in ("Z", "X"):
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                yield int(folder.name), int(fields[3]), words


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two starts of the same attempt, of a dispatcher that was killed and of the next one, do not overlap."""
    with open(folder / ".start", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(words: Sequence[str]) -> int:
    """``start KEY FOLDER ARGV``, ``look KEY...`` or ``stop KEY``; the answer is a JSON object on stdout.

    ARGV is a JSON list: as words of its own it would make this process look like the job.
    """
    match list(words):
        case ["start", key, folder, argv]:
            answer: dict[str, object] = {"pid": start(key, Path(folder), [str(word) for word in json.loads(argv)])}
        case ["look", *keys]:
            answer = {"jobs": {key: running(key) for key in keys}}
        case ["stop", key]:
            stop(key)
            answer = {"stopped": key}
        case _:
            print("usage: start KEY FOLDER ARGV | look KEY... | stop KEY", file=sys.stderr)
            return 2
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, ValueError) as _fault:
        sys.exit(f"epfuse: {_fault}")
