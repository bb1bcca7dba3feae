"""Ranks under torchrun that die, stop, hang, raise or hold another layer: named, bounded, and never a partial sum."""

from __future__ import annotations

import multiprocessing
import re
import signal
import socket
import time
from pathlib import Path

import pytest

import epfuse
from epfuse.parallel.guard import EXIT_RANK_FAILED, LIMIT_SECONDS, Seen, Sign, verdict
from epfuse.parallel.launch import Placement, launch_ranks
from tests.parallel.guard_entries import LIMIT, disagree, guarded

RANKS = 3
PROCESS = r"process \d+ on \S+"


def run(folder: Path, victim: int, how: str) -> list[int | None]:
    """Exit codes; a stopped rank is killed once the others have ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.parallel.guard_entries"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=guarded, args=(rank, RANKS, port, folder, victim, how), daemon=True)
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    try:
        for rank, process in enumerate(processes):
            if rank != victim:
                process.join(60)
        begin = time.monotonic()
        while victim >= 0 and processes[victim].exitcode is None and how != "SIGSTOP":
            assert time.monotonic() - begin < 60, "the victim goes on"
            time.sleep(0.05)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize(
    ("victim", "how", "says"),
    [
        (1, "SIGKILL", rf"rank 1 of 3 failed: {PROCESS} ended without a result: it is dead"),
        (1, "SIGSTOP", rf"rank 1 of 3 failed: {PROCESS} gave no sign of life for 2 s: it is stopped \(SIGSTOP\)"),
        (2, "sleep", rf"rank 2 of 3 failed: {PROCESS} did nothing for 2 s while others waited"),
        (1, "raise", r"rank 1 of 3 failed: ValueError: enough"),
        # it keeps the store, without torchrun's own
        (0, "SIGSTOP", r"rank 0 of 3, which keeps the store on 127\.0\.0\.1, failed: it gave no answer for 3 s"),
        (0, "SIGKILL", r"rank 0 of 3, which keeps the store on 127\.0\.0\.1, failed: "),
    ],
)
def test_a_rank_that_fails_ends_all_with_its_name(tmp_path: Path, victim: int, how: str, says: str) -> None:
    codes = run(tmp_path, victim, how)
    for rank in range(RANKS):
        text = (tmp_path / f"err-{rank}").read_text()
        assert not (tmp_path / f"result-{rank}").exists()
        if rank != victim:
            assert codes[rank] == EXIT_RANK_FAILED, text
            assert re.search(rf"^epfuse: {says}.*; rank {rank} ends for it$", text, re.MULTILINE), text
    if how == "raise":
        assert codes[victim] == 1
        assert "ValueError: enough" in (tmp_path / f"err-{victim}").read_text()
    if how == "SIGKILL":
        assert codes[victim] == -signal.SIGKILL


def test_good_ranks_end_well(tmp_path: Path) -> None:
    assert run(tmp_path, -1, "") == [0] * RANKS
    assert [(tmp_path / f"result-{rank}").read_text() for rank in range(RANKS)] == ["3.0"] * RANKS
    assert not any((tmp_path / f"err-{rank}").read_text().count("epfuse:") for rank in range(RANKS))


def test_what_a_rank_may_hold_the_others_for_leaves_room_in_a_minute() -> None:
    """Silence is seen within the limit and a look or two; a silent store after 1.5 limits."""
    assert 1.5 * LIMIT_SECONDS + 3 < 60
    assert LIMIT < LIMIT_SECONDS


def seen(waits: int, idle: float = 0.0, silent: float = 0.0) -> Seen:
    return Seen(Sign(1, waits, 0, "host", 7, "elsewhere"), silent, idle)


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ([seen(3, 99), seen(2, 1)], None),  # it computes
        ([seen(2, 99), seen(2, 99)], None),  # nobody waits
        ([seen(3, 99), seen(3, 1)], None),  # it has just come
        ([seen(3, 99), seen(2, 10)], "rank 1 of 2 failed: .* did nothing for 10 s while others waited"),
        ([seen(3, 99), seen(2, 99), seen(4, 0)], "rank 1 of 3 failed"),
        ([seen(5, 99), seen(3, 99)], "rank 1 of 2 failed: .* waits in an earlier collective than the others"),
        ([seen(3, 99), seen(3, 99)], "all 2 ranks failed: each waits for the others"),
        ([seen(3), seen(2, 0, 10)], "rank 1 of 2 failed: .* gave no sign of life for 10 s: dead, stopped, or cut off"),
    ],
)
def test_who_holds_the_others(ranks: list[Seen], says: str | None) -> None:
    found = verdict(ranks, 10)
    assert found is None if says is None else found is not None and re.match(says, found)


def test_work_and_beats_are_signs_of_life() -> None:
    one = seen(2, 5, 5)
    one.note(Sign(2, 2, 0, "host", 7, "elsewhere"), 1)
    assert (one.silent, one.idle) == (0, 6)
    one.note(Sign(3, 2, 40, "host", 7, "elsewhere"), 1)
    assert one.idle == 0
    waiting = seen(3, 5, 5)
    waiting.note(Sign(1, 3, 40, "host", 7, "elsewhere"), 1)  # a GPU's rank spins while it waits
    assert (waiting.silent, waiting.idle) == (6, 6)


def test_ranks_that_hold_other_layers_are_told_before_anything_is_summed(tmp_path: Path) -> None:
    every = launch_ranks(
        disagree, (), ranks=3, placement=Placement.CPU, log_dir=tmp_path, preload=("tests.parallel.guard_entries",)
    )
    assert every[0] == every[1] == every[2]
    told = every[0]
    assert told.pop("nothing") == ""
    assert told.pop("sum") == "3.0"
    version = epfuse.__version__
    wanted = {
        "H": "H: rank 1 has '64'; the others have '32'",
        "I": "I: rank 1 has '64'; the others have '32'",
        "dtype": "weights: rank 1 has 'dense torch.bfloat16'; the others have 'dense torch.float32'",
        "format": "weights: rank 1 has 'mxfp8 '; the others have 'dense torch.float32'",
        "biases": "biases: rank 1 has 'none'; the others have 'down_bias'",
        "gate": "gate: rank 1 has 'no'; the others have 'yes'",
        "experts": "experts: rank 1 has '8'; the others have '6'",
        "checkpoint": "checkpoint: rank 1 has 'revision 1'; the others have 'revision 0'",
        "an expert on two ranks": "expert 0 of the expert maps is on ranks 0, 1, so it would count 2 times; expert 1"
        " of the expert maps is on ranks 0, 1, so it would count 2 times; expert 2 of the expert maps is on no rank;"
        " 1 more",
        "an expert on none": "rank 1 has weights of 2 experts and an expert map of 1; expert 3 of the expert maps is on"
        " no rank",
        "another placement": "placement: rank 1 has '((0, 3), (1, 4), (2, 5))'; the others have"
        " '((0, 1), (2, 3), (4, 5))'",
        "a map of another placement": "rank 0's expert map is not the placement's; rank 1's expert map is not the"
        " placement's; rank 2's expert map is not the placement's",
        "more weights than the map": "rank 1 has weights of 3 experts and an expert map of 2",
        "activations": "activations: rank 1 has 'torch.float16'; the others have 'torch.bfloat16'",
        "room": "room: rank 1 has '5'; the others have '4'",
        "a fact in place of another": "facts has 'weights', which is compared anyway; give it another name",
        "version": f"epfuse: rank 1 has '0.0.1'; the others have '{version}'",
        "all different": "room: rank 0 has '0', rank 1 has '1', rank 2 has '2'",
    }
    for copies in (told.pop("copies"), told.pop("copies of biases")):
        assert re.fullmatch(
            r"copies of expert 0 have different weights or biases: rank 0\+2 \w{8}, rank 1 \w{8}", copies
        )
    assert re.fullmatch(
        r"copies of expert 0 have different weights or biases: rank 0 \w{8}, rank 0 \w{8}",
        told.pop("copies on one rank"),
    )
    assert told == wanted
