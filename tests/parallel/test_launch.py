from __future__ import annotations

from pathlib import Path

import pytest
import torch

from epfuse.errors import ConfigError
from epfuse.parallel.launch import Placement, RankFailed, launch_ranks
from tests.parallel.entries import fail_on_last_rank, kill_last_rank, sum_of_ranks, talk


def test_bf16_is_summed_in_float32_and_rounded_once(tmp_path: Path) -> None:
    ranks = 3
    results = launch_ranks(
        sum_of_ranks, (torch.bfloat16,), ranks=ranks, placement=Placement.choose(ranks), log_dir=tmp_path
    )
    # 256 + 1 + 1 is 258 in bf16's steps of 2; a sum that rounds after each addition stays at 256
    assert results == [[6.0, 258.0, 3.0]] * ranks


def test_a_failing_rank_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"^rank 1 of 2 failed: ValueError: the last rank has had enough$"):
        launch_ranks(fail_on_last_rank, (), ranks=2, placement=Placement.choose(2), log_dir=tmp_path)


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"^rank 1 of 2 failed: .*SIGKILL"):
        launch_ranks(kill_last_rank, (), ranks=2, placement=Placement.choose(2), log_dir=tmp_path)


def test_output_of_ranks_goes_to_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_ranks(talk, (), ranks=2, placement=Placement.choose(2), log_dir=tmp_path) == [0, 1]
    assert capfd.readouterr().out == ""
    written = [path.read_text() for path in tmp_path.rglob("stdout.log")]
    assert len(written) == 2
    assert all("a rank says something" in text for text in written)


def test_refuses_no_ranks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ranks is 0"):
        launch_ranks(talk, (), ranks=0, placement=Placement.CPU, log_dir=tmp_path)


def test_refuses_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"log_dir is .*absent; it must be a folder that is there"):
        launch_ranks(talk, (), ranks=2, placement=Placement.CPU, log_dir=tmp_path / "absent")
