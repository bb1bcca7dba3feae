"""Functions that ranks run in tests: module-level, so that another process finds them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from epfuse.parallel.launch import RankContext


def sum_of_ranks(context: RankContext, dtype: torch.dtype) -> list[float]:
    partial = torch.tensor([1.0 + context.group.rank, 256.0, 1.0], dtype=dtype, device=context.device)
    if context.group.rank:
        partial[1] = 1.0
    total = context.group.all_reduce(partial)
    assert total.dtype == dtype
    assert total.device == context.device
    return total.float().tolist()


def fail_on_last_rank(context: RankContext) -> None:
    if context.group.rank == context.group.size - 1:
        raise ValueError("the last rank has had enough")
    context.group.all_reduce(torch.zeros(1, device=context.device))


def kill_last_rank(context: RankContext) -> None:
    if context.group.rank == context.group.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)


def talk(context: RankContext) -> int:
    print("a rank says something")
    return context.group.rank


def misbehave(context: RankContext, victim: int, how: str, after: int, folder: Path) -> float:
    """Sum five times; before sum number ``after`` the victim does what ``how`` says. Leaves the process's id."""
    (folder / f"pid-{context.group.rank}").write_text(str(os.getpid()))
    total = torch.zeros(1, device=context.device)
    for step in range(5):
        if context.group.rank == victim and step == after:
            misdeed(how)
            if how == "return":
                return -1.0
        total = context.group.all_reduce(torch.ones(1, device=context.device))
    return total.item()


def misdeed(how: str) -> None:
    if how.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[how])
    elif how == "sleep":
        time.sleep(600)
    elif how == "exit":
        os._exit(0)
    elif how == "sys.exit":
        sys.exit(3)
    elif how == "raise":
        raise ValueError("enough")


def signal_while_summing(context: RankContext, victim: int, name: str, seconds: float, folder: Path) -> list[float]:
    """Sum for a while; the victim gets a signal at some moment of it."""
    (folder / f"pid-{context.group.rank}").write_text(str(os.getpid()))
    context.group.all_reduce(torch.zeros(1, device=context.device))  # both are there
    if context.group.rank == victim:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.Signals[name])).start()
    ones = torch.ones(20_000, device=context.device)
    return [float(context.group.all_reduce(ones.clone()).min()) for _ in range(2000)]


def have_children(context: RankContext, folder: Path) -> None:
    """Each rank starts a process, both say who they are; the last rank stops itself, the others wait for it."""
    child = subprocess.Popen(["sleep", "600"])
    (folder / f"pid-{context.group.rank}").write_text(str(os.getpid()))
    (folder / f"pid-of-child-{context.group.rank}").write_text(str(child.pid))
    context.group.all_reduce(torch.zeros(1))
    if context.group.rank == context.group.size - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    context.group.all_reduce(torch.zeros(1))
