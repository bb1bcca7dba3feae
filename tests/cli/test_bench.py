"""``epfuse bench``: what it prints, writes, and how it exits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from epfuse.bench import contender, measure, roofs
from epfuse.bench.read_record import read_record
from epfuse.cli.main import main

SMALL = ["bench", "--device", "cpu", "--quick", "--shape", "custom", "--hidden", "64", "--intermediate", "32"]
SMALL += ["--experts", "8", "--top-k", "2", "--ep-size", "2", "--tokens", "1,5"]


@pytest.fixture(autouse=True)
def quick_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofs, "CPU_COPY_BYTES", 1 << 20)
    monkeypatch.setattr(roofs, "CPU_MATRIX", 64)


def run(*options: str) -> Result:
    return CliRunner().invoke(main, [*SMALL, *options])


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every path of ours loses its last route."""
    right = contender.fused_experts

    def forgets(hidden, weights, topk_weights, topk_ids, *args, **kwargs) -> torch.Tensor:
        return right(hidden, weights, topk_weights, topk_ids.clone().fill_(-1), *args, **kwargs)

    monkeypatch.setattr(contender, "fused_experts", forgets)


def test_tables() -> None:
    result = run("--peers", "torch", "--routing", "uniform,all-to:2")
    assert result.exit_code == 0, result.output
    for words in ("custom: H=64 I=32 L=4 of E=8 K=2", "uniform routing", "all-to:2 routing", "torch grouped_mm bf16"):
        assert words in result.stdout
    assert "absent" not in result.stdout


def test_record_page_and_pictures(tmp_path: Path) -> None:
    record, page, pictures = tmp_path / "r.json", tmp_path / "r.html", tmp_path / "pictures"
    result = run("--paths", "all", "--json", str(record), "--html", str(page), "--pictures", str(pictures))
    assert result.exit_code == 0, result.output
    assert "uniform routing" in result.stdout
    found = read_record(record)
    assert found.complete
    assert [(row.label, row.tokens) for row in found.rows[:2]] == [("reference dense", 1), ("reference mxfp8", 1)]
    assert {row.tokens for row in found.rows} == {1, 5}
    assert found.run["command"]
    assert found.run["versions"]["torch"] == torch.__version__
    assert [peer.name for peer in found.absent if peer.name == "vllm"] == ["vllm"]
    assert page.read_text().startswith("<!doctype html>")
    assert {"time-uniform.svg", "floor-uniform.svg"} <= {file.name for file in pictures.iterdir()}


def test_pictures_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    result = run("--peers", "none", "--pictures", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "only SVG: PNG pictures need matplotlib" in result.stderr
    assert {file.suffix for file in tmp_path.iterdir()} == {".svg"}


@pytest.mark.parametrize("options", [["--json"], ["--json", "-"]])
def test_json_on_stdout(options: list[str]) -> None:
    result = run("--peers", "none", "--seed", "3", *options)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["format"], record["ok"], record["complete"]) == ("epfuse-bench-1", True, True)
    assert record["layer"]["local_experts"] == 4
    assert record["run"]["seed"] == 3
    assert record["rows"][0]["time"]["median_us"] > 0


@pytest.mark.usefixtures("broken")
def test_a_wrong_result_shows_no_time_and_exits_1() -> None:
    result = run("--peers", "none", "--json", "-")
    assert result.exit_code == 1
    record = json.loads(result.stdout)
    assert record["ok"] is False
    assert [row["time"] for row in record["rows"]] == [None] * 4
    assert all("the result is wrong" in row["failure"] for row in record["rows"])


@pytest.mark.usefixtures("broken")
def test_a_wrong_result_in_the_table() -> None:
    result = run("--peers", "none")
    assert result.exit_code == 1
    assert "FAIL: bf16 dense, T=1, uniform: the result is wrong" in result.stdout


@pytest.fixture
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample takes as long as every other."""

    def elapsed(run: Callable[[], None], device: torch.device) -> float:
        run()
        return 1e-3

    monkeypatch.setattr(measure, "elapsed", elapsed)


def older(tmp_path: Path, factor: float) -> str:
    """A record of the same layer in which everything took ``factor`` times as long."""
    file = tmp_path / "older.json"
    assert run("--peers", "none", "--json", str(file)).exit_code == 0
    values = json.loads(file.read_text())
    for row in values["rows"]:
        row["time"] |= {name: factor * row["time"][name] for name in ("median_us", "q1_us", "q3_us")}
    file.write_text(json.dumps(values))
    return str(file)


@pytest.mark.usefixtures("steady_clock")
def test_compare(tmp_path: Path) -> None:
    file = older(tmp_path, 1e-3)
    result = run("--peers", "none", "--compare", file)
    assert result.exit_code == 0, result.output
    assert "slower" in result.stdout
    assert run("--peers", "none", "--compare", file, "--fail-on-slower").exit_code == 1
    compared = json.loads(run("--peers", "none", "--compare", file, "--json").stdout)["comparison"]
    assert [change["verdict"] for change in compared["changes"]] == ["slower"] * 4


@pytest.mark.usefixtures("steady_clock")
def test_faster_is_no_failure(tmp_path: Path) -> None:
    assert run("--peers", "none", "--compare", older(tmp_path, 1e3), "--fail-on-slower").exit_code == 0


def test_a_run_that_is_cut_off_leaves_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = contender.fused_experts

    def interrupted(hidden, *args, **kwargs) -> torch.Tensor:
        if hidden.shape[0] == 5:
            raise KeyboardInterrupt
        return right(hidden, *args, **kwargs)

    monkeypatch.setattr(contender, "fused_experts", interrupted)
    assert run("--peers", "none", "--json", str(tmp_path / "r.json")).exit_code == 130
    record = read_record(tmp_path / "r.json")
    assert not record.complete
    assert [row.tokens for row in record.rows] == [1, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokens", "0"], "'0' is not a token count"),
        (["--tokens", "many"], "'many' is not a token count"),
        (["--paths", "w4a4"], "'w4a4' is not one of auto, all, reference"),
        (["--paths", "w8a8"], "path 'w8a8' has no kernel for cpu"),
        (["--peers", "sglang"], "'sglang' is not one of vllm, transformers, torch, deepgemm, flashinfer, none"),
        (["--peers", "none,torch"], "none excludes all others"),
        (["--routing", "zipf"], "routing is 'zipf'; it must be"),
        (["--routing", "all-to:5"], "this rank has 4 experts"),
        (["--ep-size", "3"], "ep_size is 3; it must divide experts=8"),
        (["--shape", "large"], "'large' is not one of"),
        (["--device", "tpu0"], "device is 'tpu0'; it must be cpu, cuda or cuda:N"),
        (["--fail-on-slower"], "--fail-on-slower needs --compare"),
        (["--compare", "none.json"], "File 'none.json' does not exist"),
        (["--json", "no/such/folder/r.json"], "the folder no/such/folder does not exist"),
        (["--html", "no/such/folder/r.html"], "the folder no/such/folder does not exist"),
    ],
)
def test_wrong_usage_exits_2(options: list[str], words: str) -> None:
    result = run(*options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


def test_an_older_record_of_another_layer(tmp_path: Path) -> None:
    file = older(tmp_path, 1.0)
    result = CliRunner().invoke(main, ["bench", "--device", "cpu", "--quick", "--compare", file])
    assert result.exit_code == 2
    assert "the older record is of custom" in result.stderr


def test_help_has_examples() -> None:
    result = CliRunner().invoke(main, ["bench", "--help"])
    assert result.exit_code == 0
    for words in ("Examples:", "epfuse bench --quick --device cpu", "Exit status:"):
        assert words in result.stdout
