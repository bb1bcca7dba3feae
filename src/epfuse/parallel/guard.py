"""Ranks that watch each other: one that dies, is stopped or hangs ends all, with its name.

Nothing can interrupt a process that waits in a collective. So a thread of every rank tells the others through
torch.distributed's store, about every second, that it lives, what it has done and whether it waits for others; and it
ends its own process when one of them holds up the rest.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from epfuse.parallel.launch import STALL_SECONDS

EXIT_RANK_FAILED = 2
"""Exit status of a rank that another rank's failure ends."""
LIMIT_SECONDS = STALL_SECONDS / 2
"""How long a rank may hold the others, by default: with all that follows, they have ended in under a minute."""
JOIN_SECONDS = 120.0
"""How long the ranks' first signs may take; what comes before (the group) has been a collective already."""


@dataclass(frozen=True)
class Sign:
    """What a rank tells the others.

    Attributes:
        beats: signs given; they go on while the process runs, whatever its main thread does.
        waits: collectives begun and ended: odd while the rank waits for the others.
        work: processor time of its main thread, milliseconds.
        host, pid: its process.
        place: which machine's process numbers these are, container by container.
    """

    beats: int
    waits: int
    work: int
    host: str
    pid: int
    place: str


@dataclass
class Seen:
    """A rank as another one sees it; seconds without a new beat, and without a sign of work."""

    sign: Sign
    silent: float = 0.0
    idle: float = 0.0

    def note(self, sign: Sign, elapsed: float) -> None:
        """A look ``elapsed`` seconds after the last one."""
        self.silent = 0.0 if sign.beats != self.sign.beats else self.silent + elapsed
        moved = sign.waits != self.sign.waits or (sign.waits % 2 == 0 and sign.work != self.sign.work)
        self.idle = 0.0 if moved else self.idle + elapsed
        self.sign = sign


def verdict(seen: Sequence[Seen], limit: float) -> str | None:
    """Who holds up the rest for longer than ``limit`` seconds; None if nobody does.

    A rank that computes, or that nobody waits for, may take as long as it likes.
    """
    for rank, one in enumerate(seen):
        if one.silent >= limit:
            return f"{_rank(rank, seen)} gave no sign of life for {limit:g} s: {_fate(one.sign)}"
    held = [one for one in seen if one.sign.waits % 2 and one.idle >= limit]
    if not held:
        return None
    holding = [rank for rank, one in enumerate(seen) if one.sign.waits % 2 == 0]
    guilty = [rank for rank in holding if seen[rank].idle >= limit]
    if guilty:
        return f"{_rank(guilty[0], seen)} did nothing for {limit:g} s while others waited"
    if holding or len(held) < len(seen):  # somebody computes, or has just come
        return None
    least = min(one.sign.waits for one in seen)
    behind = [rank for rank, one in enumerate(seen) if one.sign.waits == least]
    if len(behind) == len(seen):
        return f"all {len(seen)} ranks failed: each waits for the others, for {limit:g} s: in different collectives"
    return f"{_rank(behind[0], seen)} waits in an earlier collective than the others, for {limit:g} s"


@dataclass(frozen=True)
class Keeper:
    """The process that keeps the store; when it ends, the store is gone.

    Attributes:
        name: for the message where it is gone.
        here: whether it is this one, which then is the last one to end.
    """

    name: str
    here: bool


class Guard:
    """Watches the other ranks while its ``with`` block runs.

    A rank whose block raises is named with what it raised. A rank in which a collective fails, because another rank is
    gone, waits until that one's name is known. In both cases, and where a rank is stopped or hangs, every process says
    on stderr who failed and ends with `EXIT_RANK_FAILED`; the rank that raised goes on raising.

    Args:
        store: torch.distributed's, one that all ranks share; the guard uses a connection of its own.
        rank: this rank.
        size: P.
        keeper: the process that keeps the store.
        limit: seconds for which a rank may hold the others.
    """

    def __init__(self, store: Store, rank: int, size: int, keeper: Keeper, limit: float = LIMIT_SECONDS) -> None:
        self._store = PrefixStore("epfuse-guard", store.clone())  # type: ignore[attr-defined]
        self._rank, self._size, self._keeper, self._limit = rank, size, keeper, limit
        self._pause = min(1.0, limit / 8)
        self._beats = self._waits = 0
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._stopped = threading.Event()
        self._answered = time.monotonic()
        self._threads = [
            threading.Thread(target=run, name=f"epfuse guard {name}", daemon=True)
            for name, run in (("of ranks", self._watch_ranks), ("of the store", self._watch_store))
        ]

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around all that waits for other ranks: a collective, and on a GPU the host's next synchronisation."""
        self._waits += 1
        yield
        self._waits += 1  # not where an error ends the wait: this rank has not got past it

    def __enter__(self) -> Guard:
        self._store.set(f"sign-{self._rank}", self._sign())
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._waits % 2:
            # another rank is the cause: the thread finds out which one, and ends this process
            self._threads[0].join(3 * self._limit)
        self._stopped.set()
        self._threads[0].join(2 * self._pause)
        if error is not None:
            self._accuse(f"rank {self._rank} of {self._size} failed: {kind.__name__ if kind else ''}: {error}")
        self._leave()

    def _leave(self) -> None:
        """Touch the store for the last time; whoever keeps it waits for the others to do so, as far as they can."""
        failed = self._store.check(["failed"])
        self._store.set(f"done-{self._rank}", "1")
        others = [f"done-{rank}" for rank in range(self._size)]
        end = time.monotonic() + (4 * self._pause if failed else self._limit)
        while self._keeper.here and time.monotonic() < end and not self._store.check(others):
            time.sleep(self._pause / 8)

    def _sign(self) -> str:
        work = int(1000 * time.clock_gettime(self._clock))
        self._beats += 1
        return json.dumps(asdict(Sign(self._beats, self._waits, work, socket.gethostname(), os.getpid(), _place())))

    def _watch_ranks(self) -> None:
        seen: list[Seen | None] = [None] * self._size
        looked = begun = time.monotonic()
        while not self._stopped.wait(self._pause):
            try:
                self._store.set(f"sign-{self._rank}", self._sign())
                now = time.monotonic()
                elapsed, looked = min(now - looked, 2 * self._pause), now  # a machine that slept accuses nobody
                for rank in range(self._size):
                    self._look(rank, seen, elapsed)
                known = [one for one in seen if one is not None]
                found = None
                if len(known) == self._size:
                    found = verdict(known, self._limit)
                elif now - begun > JOIN_SECONDS:
                    missing = [str(rank) for rank, one in enumerate(seen) if one is None]
                    found = f"rank {', '.join(missing)} of {self._size} failed: it never joined"
                gone = self._gone(known) if len(known) == self._size else None
                self._end_if_accused(found or gone)
                self._answered = time.monotonic()
            except dist.DistError as error:
                if not self._stopped.is_set():
                    self._end(f"{self._keeper.name} failed: {str(error).splitlines()[0]}")

    def _look(self, rank: int, seen: list[Seen | None], elapsed: float) -> None:
        if not self._store.check([f"sign-{rank}"]):
            return
        sign = Sign(**json.loads(self._store.get(f"sign-{rank}")))
        before = seen[rank]
        if before is None:
            seen[rank] = Seen(sign)
        elif self._store.check([f"done-{rank}"]):  # it has left its block, and may wait or end as it likes
            before.silent = before.idle = 0.0
            before.sign = Sign(sign.beats, 0, sign.work, sign.host, sign.pid, "")
        else:
            before.note(sign, elapsed)

    def _gone(self, seen: list[Seen]) -> str | None:
        """A process of this machine that has ended without a word; no need to wait for its silence."""
        for rank, one in enumerate(seen):
            dead = _is_here(one.sign) and _state(one.sign.pid) in (None, "Z")
            if dead and not self._store.check([f"done-{rank}"]):  # which it says before it ends
                return f"{_rank(rank, seen)} ended without a result: {_fate(one.sign)}"
        return None

    def _end_if_accused(self, found: str | None) -> None:
        if found is not None and not self._store.check(["failed"]):
            self._accuse(found)
        if self._store.check(["failed"]) and not self._stopped.is_set():
            sentence = self._store.get("failed").decode()
            self._leave()
            self._end(sentence)

    def _accuse(self, sentence: str) -> None:
        """The first accusation counts: ranks that end for it are not to be accused themselves."""
        self._store.compare_set("failed", "", sentence)

    def _watch_store(self) -> None:
        """A store whose process is stopped lets the other thread hang."""
        silent, looked = 0.0, time.monotonic()
        last = self._answered
        while not self._stopped.wait(self._pause):
            now = time.monotonic()
            silent = 0.0 if self._answered != last else silent + min(now - looked, 2 * self._pause)
            looked, last = now, self._answered
            if silent > 1.5 * self._limit:
                self._end(f"{self._keeper.name} failed: it gave no answer for {1.5 * self._limit:g} s")

    def _end(self, sentence: str) -> None:
        sys.stdout.flush()
        sys.stderr.write(f"epfuse: {sentence}; rank {self._rank} ends for it\n")
        sys.stderr.flush()
        os._exit(EXIT_RANK_FAILED)


def _rank(rank: int, seen: Sequence[Seen]) -> str:
    return f"rank {rank} of {len(seen)} failed: process {seen[rank].sign.pid} on {seen[rank].sign.host}"


def _fate(sign: Sign) -> str:
    """What can be seen of a process that is silent."""
    if not _is_here(sign):
        return "dead, stopped, or cut off"
    state = _state(sign.pid)
    if state in (None, "Z"):
        return "it is dead (killed, as the kernel does when memory is short, or crashed)"
    return "it is stopped (SIGSTOP)" if state == "T" else "it runs, and does not answer"


def _is_here(sign: Sign) -> bool:
    return bool(sign.place) and sign.place == _place()


@functools.cache
def _place() -> str:
    """This boot of this machine, and the namespace that its process numbers are of; empty where nobody can say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _state(pid: int) -> str | None:
    """The letter that proc(5) has for a process; None where there is none, or no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return None if Path("/proc/self/stat").exists() else "?"
