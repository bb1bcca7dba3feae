"""Worker processes that die, hang or raise, and their parent that is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from epfuse.workers import Died, Workers
from tests import jobs
from tests.processes import gone, pids_in

ROOT = Path(__file__).parents[1]


def test_results_come_in_the_order_of_the_jobs() -> None:
    seen: list[int] = []
    with Workers(2, jobs.start) as workers:
        assert workers.map(jobs.job, [(number,) for number in range(6)], seen.append) == [0, 1, 4, 9, 16, 25]
        assert workers.map(jobs.job, [], seen.append) == []
    assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("how", "reason"), [("SIGKILL", "died, as one does"), ("SIGSTOP", "was ended after 5 s")])
def test_only_the_job_whose_process_dies_or_hangs_is_lost(how: str, reason: str) -> None:
    with Workers(2, jobs.start, seconds=5) as workers:
        found = workers.map(jobs.job, [(1,), (2, how), (3,), (4,)], lambda done: None)
    lost = found[1]
    assert isinstance(lost, Died)
    assert reason in lost.reason
    assert found == [1, lost, 9, 16]


def test_what_a_job_raises_is_raised() -> None:
    with Workers(1, jobs.start) as workers, pytest.raises(ValueError, match="enough"):
        workers.map(jobs.job, [(1,), (2, "raise"), (3,)], lambda done: None)


def test_an_interrupted_parent_leaves_no_process(tmp_path: Path) -> None:
    def interrupt() -> None:
        pids_in(tmp_path, 4)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt), Workers(2, jobs.start) as workers:
        workers.map(jobs.have_children, [(tmp_path, number) for number in range(4)], lambda done: None)
    thread.join()
    assert gone(pids_in(tmp_path, 4))


def test_a_killed_parent_leaves_no_process(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.jobs", str(tmp_path)]
    with subprocess.Popen(program, cwd=ROOT) as parent:
        try:
            pids = pids_in(tmp_path, 4)
        finally:
            parent.kill()
    assert gone(pids)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_daemon_has_workers_too(method: str) -> None:
    """vLLM's workers of several GPUs are daemons of multiprocessing."""
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=jobs.squares, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(60)
        assert ours.recv() == ([0, 1, 4], True)
    finally:
        process.kill()
        process.join()
