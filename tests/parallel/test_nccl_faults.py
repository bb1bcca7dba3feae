"""Two GPUs: a rank is killed or stopped while both compute one layer; the other one ends, with its name, and frees all.

pytest -s tests/parallel/test_nccl_faults.py
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from epfuse.parallel.guard import EXIT_RANK_FAILED, LIMIT_SECONDS
from tests.parallel.nccl_entries import HELD_BYTES, LIMIT, layer_forever

STEPS = 50
"""That both have done before one is struck: at whatever it does then."""
SLACK_BYTES = 1 << 28
"""Of a GPU's memory, for what others do there meanwhile."""


def until(true: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what()
        time.sleep(0.02)


def steps(folder: Path, rank: int) -> int:
    file = folder / f"steps-{rank}"
    return int(file.read_text().split()[1]) if file.exists() else 0


def free_bytes() -> list[int]:
    return [torch.cuda.mem_get_info(device)[0] for device in range(2)]


@pytest.mark.two_gpus
@pytest.mark.parametrize("replayed", [False, True], ids=["eager", "replay"])
@pytest.mark.parametrize(
    ("blow", "victim", "fate"),
    [
        (signal.SIGKILL, 1, "ended without a result: it is dead"),
        (signal.SIGSTOP, 0, rf"gave no sign of life for {LIMIT:g} s: it is stopped \(SIGSTOP\)"),
    ],
    ids=["SIGKILL", "SIGSTOP"],
)
def test_a_rank_is_struck(tmp_path: Path, blow: signal.Signals, victim: int, fate: str, replayed: bool) -> None:
    other, before = 1 - victim, free_bytes()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.parallel.nccl_entries"])
    ranks: list[BaseProcess] = [
        context.Process(target=layer_forever, args=(rank, 2, store.port, tmp_path, replayed), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    said = lambda: (tmp_path / f"err-{other}").read_text()  # noqa: E731
    try:
        both = lambda: min(steps(tmp_path, rank) for rank in range(2)) >= STEPS or not all_run(ranks)  # noqa: E731
        until(both, 90, lambda: f"the ranks don't get going: {said()}")
        assert all_run(ranks), said()
        during = free_bytes()
        assert min(a - b for a, b in zip(before, during, strict=True)) > HELD_BYTES
        os.kill(ranks[victim].pid or 0, blow)
        struck = time.monotonic()
        ranks[other].join(60)
        took = time.monotonic() - struck
        assert ranks[other].exitcode == EXIT_RANK_FAILED, said()
        sentence = rf"^epfuse: rank {victim} of 2 failed: process {ranks[victim].pid} on \S+ {fate}.*$"
        found = re.search(sentence, said(), re.MULTILINE)
        assert found, said()
        assert took + (LIMIT_SECONDS - LIMIT if blow is signal.SIGSTOP else 0) < 60  # what it takes with the default
        print(f"\n{blow.name}, {'replay' if replayed else 'eager'}: rank {other} ended after {took:.1f} s: {found[0]}")
        # a stopped process keeps what it has mapped of it: NCCL's buffers
        until(lambda: free_bytes()[other] - during[other] > HELD_BYTES, 10, lambda: f"GPU {other}: {free_bytes()}")
    finally:
        for process in ranks:
            process.kill()
            process.join()
    back = lambda: min(a - b for a, b in zip(free_bytes(), before, strict=True)) > -SLACK_BYTES  # noqa: E731
    until(back, 10, lambda: f"memory is kept: {free_bytes()}, before {before}")


def all_run(ranks: list[BaseProcess]) -> bool:
    return all(process.exitcode is None for process in ranks)
