"""`epfuse verify --distributed`: right ranks pass, and each kind of wrong sum is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from epfuse.cli.main import main
from epfuse.parallel.launch import Placement, RankFailed, launch_ranks
from tests.verify.distributed_entries import verify

PRELOAD = ("tests.verify.distributed_entries",)
SUMS = {"all_reduce float32", "all_reduce partials"}
OTHERS = {"reduce_scatter", "all_gather", "dispatch", "compact dispatch"}


def run(folder: Path, broken: str, ranks: int = 2) -> tuple[bool, dict[str, list[str]]]:
    found = launch_ranks(
        verify, (broken,), ranks=ranks, placement=Placement.CPU, log_dir=folder, preload=PRELOAD, stall_seconds=30
    )
    assert all(one == found[0] for one in found)  # every rank has the whole record
    return found[0]


def test_right_ranks_pass(tmp_path: Path) -> None:
    passed, found = run(tmp_path, "", ranks=3)
    assert passed
    assert set(found) == SUMS | OTHERS


@pytest.mark.parametrize(
    ("broken", "where", "says"),
    [
        ("sum", SUMS, "sum over ranks: "),
        ("bits", SUMS, "the ranks' results are not the same bits"),
        ("dispatch", {"dispatch", "compact dispatch"}, "sum over ranks: "),
    ],
)
def test_a_wrong_exchange_is_found(tmp_path: Path, broken: str, where: set[str], says: str) -> None:
    passed, found = run(tmp_path, broken)
    assert not passed
    assert {name for name, failures in found.items() if failures} == where
    for name in where:
        assert any(says in failure for failure in found[name])


def test_a_rank_with_another_seed_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"RanksDisagree: seed: rank 0 has '0', rank 1 has '1'"):
        run(tmp_path, "seed")


def test_the_command_under_torchrun() -> None:
    options = ["--distributed", "--tokens", "3", "--path", "bf16", "--json", "--hidden", "32", "--intermediate", "32"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "epfuse", "verify", *options], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout)  # of rank 0 alone
    assert record["ok"]
    assert record["ranks"] == {"size": 2, "backend": "gloo", "nccl": None}
    assert {case["placement"] for case in record["cases"]} == {"contiguous", "strided"}
    assert {case["exchange"] for case in record["cases"]} == SUMS | OTHERS


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--device", "cpu"], "--device does not go with --distributed"),
        (["--ep-size", "2"], "--ep-size does not go with --distributed"),
        ([], "the environment has no RANK; start this with torchrun"),
    ],
)
def test_what_does_not_go_together(options: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    result = CliRunner().invoke(main, ["verify", "--distributed", *options])
    assert result.exit_code == 2
    assert says in result.output
