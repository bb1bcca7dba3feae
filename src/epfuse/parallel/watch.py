"""What ranks are doing, seen from outside: which of them wait for others, and which one they wait for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class WaitLog:
    """A rank's note of when it waits for the other ranks: a file that grows by a byte as a wait begins and as it ends.

    An odd size means that the rank waits; of two ranks the one with the smaller file is behind. It outlives the rank,
    and another process can read it at any time.

    Args:
        folder: the run's.
        rank: names the file.

    Attributes:
        since: when this rank began to wait, by `time.monotonic`; None where it doesn't.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.since: float | None = None
        self._file = os.open(wait_file(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around each collective. A wait that an error ends stays open: this rank has not got past it."""
        self.since = time.monotonic()
        os.write(self._file, b".")
        yield
        os.write(self._file, b".")
        self.since = None


def wait_file(folder: Path, rank: int) -> Path:
    """Where a rank's `WaitLog` is."""
    return folder / f"waits-{rank}"


@dataclass
class _Seen:
    """A rank at the last look; times in seconds."""

    waits: int = 0
    cpu: int = 0
    unmoved: float = 0.0
    stopped: float = 0.0


@dataclass(frozen=True)
class Stuck:
    """Ranks that hold the others, and how."""

    ranks: list[int]
    how: str


class Watch:
    """Looks at the ranks from time to time and finds the one that holds the others.

    A rank shows life where its main thread uses the processor or its `WaitLog` grows. Where that can't be seen, because
    the machine shows no ``/proc``, a rank passes for alive until its own collectives give up.

    Args:
        folder: where the ranks' `WaitLog` files are.
        pids: process of each rank.
        limit: seconds.
    """

    def __init__(self, folder: Path, pids: Sequence[int], limit: float) -> None:
        self._folder = folder
        self._pids = pids
        self._limit = limit
        self._seen = [_Seen() for _ in pids]

    def look(self, elapsed: float) -> None:
        """Note what has changed.

        Args:
            elapsed: seconds since the last look in which this process was awake.
        """
        for rank, (pid, seen) in enumerate(zip(self._pids, self._seen, strict=True)):
            waits, found = self.waits(rank), _main_thread(pid)
            state, cpu = found or ("", seen.cpu)
            if found is None or (waits, cpu) != (seen.waits, seen.cpu):
                seen.waits, seen.cpu, seen.unmoved = waits, cpu, 0.0
            else:
                seen.unmoved += elapsed
            seen.stopped = seen.stopped + elapsed if state == "T" else 0.0

    def waits(self, rank: int) -> int:
        """Size of a rank's `WaitLog`."""
        try:
            return wait_file(self._folder, rank).stat().st_size
        except FileNotFoundError:
            return 0

    def behind(self, rank: int) -> list[int]:
        """The ranks that are farthest behind, if ``rank`` isn't one of them."""
        waits = [self.waits(other) for other in range(len(self._pids))]
        least = min(waits)
        return [other for other, count in enumerate(waits) if count == least] if waits[rank] > least else []

    def stuck(self, running: Sequence[int]) -> Stuck | None:
        """Who of the running ranks holds the others for longer than the limit; None if nobody does."""
        ranks = {rank: self._seen[rank] for rank in running}
        stopped = [rank for rank, seen in ranks.items() if seen.stopped >= self._limit]
        if stopped:
            return Stuck(stopped, f"stopped by a signal (SIGSTOP) for {self._limit:g} s")
        still = {rank: seen for rank, seen in ranks.items() if seen.unmoved >= self._limit}
        if not any(seen.waits % 2 for seen in still.values()):
            return None
        holding = {rank: seen for rank, seen in still.items() if seen.waits % 2 == 0}
        if not holding and len(still) < len(ranks):  # the one that the others wait for is at work
            return None
        suspects = holding or still
        least = min(seen.waits for seen in suspects.values())
        guilty = [rank for rank, seen in suspects.items() if seen.waits == least]
        if not holding and len(guilty) == len(ranks):
            return Stuck(guilty, f"all wait for one another and did nothing for {self._limit:g} s")
        return Stuck(guilty, f"did nothing for {self._limit:g} s while others waited")


def _main_thread(pid: int) -> tuple[str, int] | None:
    """State and processor time (ticks) of a process's main thread; None where that can't be seen.

    The other threads are the backend's, which may poll while the rank itself waits.
    """
    try:
        text = Path(f"/proc/{pid}/task/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # the name before it may hold blanks; proc(5) has state as field 3, utime and stime as 14 and 15
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[11]) + int(fields[12])
