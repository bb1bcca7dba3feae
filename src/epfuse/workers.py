"""Processes that do one job each at a time; one that dies or hangs costs its own job, which is known, and no other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import current_process, get_context
from types import TracebackType
from typing import Any, TypeVar

from epfuse.children import Children, join

JOB_SECONDS = 600.0
"""For one job; compiling the slowest kernel takes some 20 s on one core."""

T = TypeVar("T")


@dataclass(frozen=True)
class Died:
    """What became of a job whose process ended."""

    reason: str


class Workers:
    """Some worker processes; leaving the ``with`` block ends them, as does this process's own end, whatever it is.

    Args:
        count: processes.
        start: called first in each of them; a module-level function.
        seconds: for one job; its process is ended then.
    """

    def __init__(self, count: int, start: Callable[[], None], seconds: float = JOB_SECONDS) -> None:
        self._free = [_Worker(start, seconds) for _ in range(count)]
        self._all = tuple(self._free)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="epfuse-worker")

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.end()
        self._threads.shutdown()

    def map(
        self, function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], done: Callable[[int], None]
    ) -> list[T | Died]:
        """What ``function(*job)`` returned, job by job.

        Args:
            function: a module-level function. What it raises is raised here, and no job is begun after that.
            jobs: arguments; they and the results are pickled.
            done: called with the number of jobs that are done, after each.
        """
        futures = [self._threads.submit(self._run, function, job) for job in jobs]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                future.result()
                done(count)
        finally:
            for future in futures:
                future.cancel()
        return [future.result() for future in futures]

    def _run(self, function: Callable[..., T], job: tuple[Any, ...]) -> T | Died:
        worker = self._free.pop()  # there are as many as threads
        try:
            return worker.run(function, job)
        finally:
            self._free.append(worker)


class _Worker:
    """One process at a time, and what it starts; another one follows where it died."""

    def __init__(self, start: Callable[[], None], seconds: float) -> None:
        self._start = start
        self._seconds = seconds
        self._lock = threading.Lock()
        self._alive: tuple[Children, ProcessPoolExecutor] | None = None
        self._ended = False

    def run(self, function: Callable[..., T], job: tuple[Any, ...]) -> T | Died:
        with self._lock:
            if self._ended:
                return Died("it was not begun")
            if self._alive is None:
                children = Children()
                pool = ProcessPoolExecutor(
                    1, mp_context=get_context("spawn"), initializer=_begin, initargs=(children.id, self._start)
                )
                self._alive = children, pool
            with _daemons_may_start_processes():
                future = self._alive[1].submit(function, *job)
        late = bool(wait([future], timeout=self._seconds).not_done)
        if late:
            self._stop()
        try:
            return future.result()
        except BrokenProcessPool:
            self._stop()
            how = f"was ended after {self._seconds:g} s" if late else "died, as one does when memory is short"
            return Died(f"the process that did it {how}")

    def end(self) -> None:
        """End the process, and begin no other."""
        with self._lock:
            self._ended = True
        self._stop()

    def _stop(self) -> None:
        with self._lock:
            if self._alive is not None:
                children, pool = self._alive
                children.end()
                pool.shutdown()
                self._alive = None


_no_daemon = threading.Lock()


@contextmanager
def _daemons_may_start_processes() -> Iterator[None]:
    """Let daemons of multiprocessing, as vLLM's workers of several GPUs are, have children: `Children` ends ours."""
    process = current_process()
    with _no_daemon:
        daemon, process.daemon = process.daemon, False
        try:
            yield
        finally:
            process.daemon = daemon


def _begin(children: int, start: Callable[[], None]) -> None:
    join(children)
    start()
