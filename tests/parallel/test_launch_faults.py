"""Ranks that stop, die, hang or leave, and launchers that are killed: bounded, named, and nothing is left running."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from epfuse.errors import ConfigError
from epfuse.parallel.launch import STALL_SECONDS, Placement, RankFailed, launch_ranks
from tests.parallel.entries import have_children, misbehave, signal_while_summing, talk
from tests.processes import gone, pids_in

ROOT = Path(__file__).parents[2]
SAYS = {
    "SIGSTOP": r"stopped by a signal \(SIGSTOP\) for 3 s; process \d+$",
    "SIGKILL": r"ended by SIGKILL, as the kernel does when memory is short",
    "SIGSEGV": r"ended by SIGSEGV",
    "SIGTERM": r"ended by SIGTERM",
    "sleep": r"did nothing for 3 s while others waited; process \d+$",
    "exit": r"ended with exit code 0 and no result$",
    "sys.exit": r"SystemExit: 3$",
    "raise": r"ValueError: enough$",
    "return": r"returned while others waited; rank \d got ",
}


def launch_misbehaving(folder: Path, victim: int, how: str, after: int, ranks: int = 3) -> list[float]:
    found: list[float] = launch_ranks(
        misbehave,
        (victim, how, after, folder),
        ranks=ranks,
        placement=Placement.CPU,
        log_dir=folder,
        stall_seconds=3.0,  # on busy cores a rank needs more than one to begin
    )
    return found


@pytest.mark.parametrize("how", SAYS)
def test_the_rank_that_misbehaves_is_named(tmp_path: Path, how: str) -> None:
    generator = random.Random(how)
    victim, after = generator.randrange(3), generator.randrange(5)
    begin = time.monotonic()
    with pytest.raises(RankFailed, match=rf"^rank {victim} of 3 failed: {SAYS[how]}"):
        launch_misbehaving(tmp_path, victim, how, after)
    assert time.monotonic() - begin < 20
    assert gone(pids_in(tmp_path, 3))


@pytest.mark.parametrize("seed", range(8))
def test_a_signal_at_any_moment_of_a_sum_never_makes_a_result(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    name, victim = ("SIGKILL", "SIGSTOP")[seed % 2], generator.randrange(2)
    with pytest.raises(RankFailed, match=rf"^rank {victim} of 2 failed: .*{name}"):
        launch_ranks(
            signal_while_summing,
            (victim, name, generator.uniform(0, 0.05), tmp_path),
            ranks=2,
            placement=Placement.CPU,
            log_dir=tmp_path,
            stall_seconds=2.0,
        )
    assert gone(pids_in(tmp_path, 2))


def test_good_ranks_are_left_alone(tmp_path: Path) -> None:
    assert launch_misbehaving(tmp_path, -1, "", 0) == [3.0] * 3
    assert gone(pids_in(tmp_path, 3))


def test_a_stopped_rank_is_waited_for_a_minute_at_most() -> None:
    assert STALL_SECONDS <= 60


def test_a_function_that_ranks_can_not_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("not_on_the_path")
    exec("def entry(context): pass", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(RankFailed, match=r"^rank \d of 2 failed: ModuleNotFoundError: .*'not_on_the_path'"):
        launch_ranks(module.entry, (), ranks=2, placement=Placement.CPU, log_dir=tmp_path)


@pytest.mark.parametrize(("ranks", "allowed"), [(64, 64), (10**20, 1024), (8, 16)])
def test_more_ranks_than_open_files_allow_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, allowed: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (allowed, allowed))
    with pytest.raises(ConfigError, match=rf"ranks is {ranks}; that takes \d+ open files .* {allowed} are allowed"):
        launch_ranks(talk, (), ranks=ranks, placement=Placement.CPU, log_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "error"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", SystemExit)])
def test_a_launcher_that_is_asked_to_end_leaves_no_process(
    tmp_path: Path, name: str, error: type[BaseException]
) -> None:
    """Nor what ranks have started, nor the rank that is stopped."""

    def interrupt() -> None:
        pids_in(tmp_path, 4)
        os.kill(os.getpid(), signal.Signals[name])

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(error) as raised:
        launch_ranks(have_children, (tmp_path,), ranks=2, placement=Placement.CPU, log_dir=tmp_path)
    thread.join()
    assert gone(pids_in(tmp_path, 4))
    if isinstance(raised.value, SystemExit):
        assert raised.value.code == 128 + signal.SIGTERM


def test_a_killed_launcher_leaves_no_process(tmp_path: Path) -> None:
    """Nor what ranks have started, nor the rank that is stopped."""
    program = [sys.executable, "-m", "tests.parallel.launcher", str(tmp_path)]
    with subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            pids = pids_in(tmp_path, 4)
        finally:
            launcher.kill()
    assert gone(pids)
