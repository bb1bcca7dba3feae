"""`epfuse verify --distributed`: right ranks pass, and each kind of wrong sum is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from epfuse.cli.main import main
from epfuse.parallel.launch import Placement, RankFailed, launch_ranks
from epfuse.verify import distributed
from epfuse.verify.problem import Problem
from epfuse.verify.scenarios import KINDS, make_scenarios
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
    ranks = record["ranks"]
    assert ranks["size"] == 2
    assert (ranks["backend"] == "nccl") is (Placement.choose(2) is Placement.GPU_EACH) is (ranks["nccl"] is not None)
    assert {case["placement"] for case in record["cases"]} == {"contiguous", "strided"}
    assert {case["exchange"] for case in record["cases"]} == SUMS | OTHERS
    assert {case["exchange"] for case in record["cases"] if "digest" in case} == SUMS


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


def test_what_is_promised_is_among_the_cases() -> None:
    """Uneven tokens, ranks without tokens and without routes, ids that are no expert, 200 other routings in a graph."""
    problem = Problem(32, 32, 8, 2, 2, (1, 64), torch.bfloat16, torch.device("cpu"), 0)
    assert (distributed.uneven(1, 2), distributed.uneven(64, 4)) == ([0, 1], [11, 11, 10, 32])
    by_name = {scenario.name: scenario.topk_ids for scenario in make_scenarios(problem) if scenario.tokens == 64}
    assert int(by_name["one rank"].min()) >= problem.local_experts  # the first rank has no route
    assert int(by_name["foreign ids"].min()) < 0
    loads = by_name["skewed"].flatten().bincount(minlength=8)
    assert int(loads.max()) > 3 * int(loads.min())
    others = distributed._other_routings(problem, 64, distributed.REPLAYS)
    assert len({tuple(one.topk_ids.flatten().tolist()) for one in others if one.name == "uniform"}) == 20
    assert (len(others), {one.name for one in others}) == (200, set(KINDS))
