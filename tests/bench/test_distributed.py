"""`epfuse bench --distributed`: what is right is timed on all ranks alike, what is wrong is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from epfuse.bench.distributed import SUMS, DistributedRow
from epfuse.bench.measure import Timing, TimingMethod
from epfuse.cli import bench_distributed
from epfuse.cli.main import main
from epfuse.parallel.launch import Placement, launch_ranks
from tests.bench.distributed_entries import bench

MODES = {*SUMS, "reduce_scatter", "all_gather", "dispatch", "compact dispatch"}


@pytest.mark.parametrize("broken", [False, True])
def test_rows_of_two_ranks(tmp_path: Path, broken: bool) -> None:
    first, second = launch_ranks(
        bench,
        (broken,),
        ranks=2,
        placement=Placement.CPU,
        log_dir=tmp_path,
        preload=("tests.bench.distributed_entries",),
    )
    assert first == second  # every rank has all ranks' times
    assert [row["routing"] for row in first] == ["uniform", "all-to:1"]
    for row in first:
        if broken:
            assert row["failure"].startswith("the result is wrong: rank 0: all_reduce float32: relative error")
            assert not row["ok"]
            assert [row["shard"], row["sums"], row["exchanges"]] == [[], {}, {}]
            continue
        assert row["ok"]
        assert 0 < row["relative_error"] < 1e-2
        assert len(row["shard"]) == 2
        assert set(row["sums"]) == set(SUMS)
        assert set(row["exchanges"]) == MODES
        assert all(timing["median_us"] > 0 for timing in [*row["shard"], *row["exchanges"].values()])
        assert len({timing["calls"] for timing in row["shard"]}) == 1
        assert sum(row["rows"]) == 12
    assert first[1]["imbalance"] >= 1


def test_what_a_row_derives() -> None:
    def timing(microseconds: float) -> Timing:
        return Timing.of([microseconds * 1e-6], 1, TimingMethod.PLAIN)

    row = DistributedRow("w8a16", "fragment", "uniform", 64, rows=[30.0, 10.0], shard=[timing(70), timing(80)])
    row.sums = {"all_reduce float32": timing(30), "all_reduce partials": timing(20)}
    row.exchanges = {"all_reduce float32": timing(120), "all_reduce partials": timing(110), "dispatch": timing(90)}
    assert row.imbalance == 1.5
    assert row.slowest_shard_us == pytest.approx(80)
    assert row.step_us == pytest.approx(110)
    assert row.over_parts == pytest.approx(1.1)


def test_the_table_has_every_time(capsys: pytest.CaptureFixture[str]) -> None:
    timing = Timing.of([1e-6], 1, TimingMethod.PLAIN)
    row = DistributedRow("w8a16", "fragment", "zipf:1.2", 64, rows=[3.0, 1.0], shard=[timing] * 2)
    row.sums = dict.fromkeys(SUMS, timing)
    row.exchanges = dict.fromkeys(sorted(MODES), timing)
    wrong = DistributedRow(
        "bf16", "dense", "uniform", 1, failure="the result is wrong: rank 1: dispatch: relative error 1"
    )
    about = {
        "layer": {"name": "small", "hidden": 64, "intermediate": 32, "experts": 16, "top_k": 4},
        "ranks": {"size": 2, "backend": "gloo"},
        "device": {"name": "cpu"},
    }
    bench_distributed._show(about, [row, wrong])
    out = capsys.readouterr().out
    assert "..." not in out
    line = next(line for line in out.splitlines() if line.strip().startswith("w8a16"))
    assert line.split() == ["w8a16", "zipf:1.2", "64", "1.50", *["1.0"] * 5, "0.50", *["1.0"] * 4]
    assert "FAIL bf16 uniform T=1: the result is wrong: rank 1: dispatch: relative error 1" in out


@pytest.mark.parametrize("option", ["--device", "--peers", "--ep-size"])
def test_what_does_not_go_together(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"--device": "cpu", "--peers": "none", "--ep-size": "2"}[option]
    result = CliRunner().invoke(main, ["bench", "--distributed", option, value])
    assert (result.exit_code, f"{option} does not go with --distributed" in result.output) == (2, True)
    monkeypatch.delenv("RANK", raising=False)
    result = CliRunner().invoke(main, ["bench", "--distributed"])
    assert (result.exit_code, "start this with torchrun" in result.output) == (2, True)
