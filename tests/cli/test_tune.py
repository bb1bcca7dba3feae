"""``epfuse tune``: what it refuses, and a run of it with a bench in place of the GPU."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result

from epfuse import Target
from epfuse.cli import tune_run
from epfuse.cli.main import main
from epfuse.config import Bias
from epfuse.families.family import Stage
from epfuse.measured import store
from epfuse.stages.tiles import LayerTiles
from epfuse.tuning import bench as tuning_bench
from epfuse.tuning import prune
from epfuse.tuning.search import Timed, TuningPoint


def tune(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["tune", *arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "cpu"), "device is 'cpu'; tiles are searched on a GPU"),
        (("--device", "warp"), "device is 'warp'"),
        (("--tokens", "0"), "'0' is no list of token counts"),
        (("--tokens", "1,,2"), "no list of token counts"),
        (("--shape", "small,large"), "'large' is not one of minimax-m3-ep8"),
        (("--path", "w4a4"), "'w4a4' is not one of w8a16, bf16, w8a8, block_fp8"),
        (("--part", "3/2"), "'3/2' is no part"),
        (("--shape", "custom"), "shape 'custom' needs"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], words: str) -> None:
    result = tune(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr


class Bench:
    """Smaller tiles are faster."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def stage(self, point: TuningPoint, stage: Stage, block_m: int, tile: object) -> Timed:
        return Timed(float(tile.block_n))  # type: ignore[attr-defined]

    def layer(self, point: TuningPoint, tiles: LayerTiles) -> Timed:
        return Timed(float(tiles.gate_up.block_n + tiles.down.block_n))

    def floor_us(self, point: TuningPoint, stage: Stage) -> float:
        return 8.0


@pytest.fixture
def _mi300x(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_run, "_gpu", lambda name: torch.device("meta"))
    monkeypatch.setattr(tune_run, "target_of", lambda device: Target.GFX942)
    monkeypatch.setattr(tune_run, "device_name", lambda device: "AMD Instinct MI300X")
    monkeypatch.setattr(tuning_bench, "DeviceBench", Bench)
    monkeypatch.setattr(prune, "unfit", lambda candidates, workers, progress: {})


RUN = ("--path", "bf16", "--tokens", "1,64")


@pytest.mark.usefixtures("_mi300x")
def test_a_run_writes_tables_prints_before_and_after_and_goes_on(tmp_path: Path) -> None:
    result = tune(*RUN, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "before us" in result.stdout
    assert "128.0" in result.stdout
    assert "bf16 T=64: 128.0 -> 64.0 us" in result.stderr
    (measured,) = store.read_table(tmp_path, Target.GFX942, Stage.DOWN).measurements
    assert {row.tokens for row in measured.rows} == {1, 64}
    assert "--again measures anew" in tune(*RUN, "--out", str(tmp_path)).stdout
    again = json.loads(tune(*RUN, "--out", str(tmp_path), "--again", "--json").stdout)
    assert [outcome["tokens"] for outcome in again] == [1, 64]


@pytest.mark.usefixtures("_mi300x")
def test_several_layers_in_one_run(tmp_path: Path) -> None:
    arguments = (*RUN, "--out", str(tmp_path), "--shape", "minimax-m3-ep4,small")
    found = json.loads(tune(*arguments, "--json").stdout)
    assert [(one["shape"], one["tokens"]) for one in found] == [
        ("minimax-m3-ep4", 1), ("minimax-m3-ep4", 64), ("small", 1), ("small", 64),
    ]  # fmt: skip
    measured = store.read_table(tmp_path, Target.GFX942, Stage.DOWN).measurements
    assert {entry.shape.hidden for entry in measured} == {6144, 512}
    assert tune(*arguments).stdout.count("--again measures anew") == 2
    result = tune(*arguments, "--to-vllm", str(tmp_path))
    assert result.exit_code == 2
    assert "--to-vllm is for one shape; --shape names 2" in result.stderr


@pytest.mark.usefixtures("_mi300x")
def test_a_layer_with_biases_has_rows_of_its_own(tmp_path: Path) -> None:
    arguments = ("--path", "bf16", "--tokens", "1", "--out", str(tmp_path), "--shape")
    assert tune(*arguments, "gpt-oss-20b-biases").exit_code == 0
    assert "before us" in tune(*arguments, "gpt-oss-20b").stdout  # not taken for done
    assert "--again measures anew" in tune(*arguments, "gpt-oss-20b-biases").stdout
    measured = store.read_table(tmp_path, Target.GFX942, Stage.DOWN).measurements
    assert [entry.bias for entry in measured] == [Bias.ADDED, Bias.NONE]


@pytest.mark.usefixtures("_mi300x")
def test_known_tiles_only(tmp_path: Path) -> None:
    result = tune(*RUN, "--out", str(tmp_path), "--space", "known", "--json")
    assert result.exit_code == 0, result.output
    assert [outcome["tokens"] for outcome in json.loads(result.stdout)] == [1, 64]


@pytest.mark.usefixtures("_mi300x")
def test_a_budget_that_compiling_took_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 23.0])
    monkeypatch.setattr(tune_run, "time", SimpleNamespace(monotonic=lambda: next(times)))
    result = tune(*RUN, "--out", str(tmp_path), "--budget", "20")
    assert result.exit_code == 2
    assert "--budget is 20 s and compiling took 23 s" in result.stderr


@pytest.mark.usefixtures("_mi300x")
def test_tiles_for_vllm(tmp_path: Path) -> None:
    result = tune(*RUN, "--out", str(tmp_path), "--to-vllm", str(tmp_path / "vllm"))
    assert result.exit_code == 0, result.output
    written = tmp_path / "vllm" / "E=16,N=3072,device_name=AMD_Instinct_MI300X.json"
    assert json.loads(written.read_text())["64"]["BLOCK_SIZE_N"] == 32
    extra = tune(*RUN, "--out", str(tmp_path), "--again", "--json", "--from-vllm", str(written))
    assert extra.exit_code == 0, extra.output


@pytest.mark.usefixtures("_mi300x")
def test_hopper_paths_have_nothing_for_vllm(tmp_path: Path) -> None:
    result = tune("--path", "w8a16", "--tokens", "1", "--out", str(tmp_path), "--to-vllm", str(tmp_path))
    assert result.exit_code == 2
    assert "none was tuned" in result.stderr


@pytest.mark.usefixtures("_mi300x")
def test_trials_are_timed_and_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_run.machine, "describe_device", lambda device: {"name": "AMD Instinct MI300X"})
    tile = {"kind": "portable", "block_n": 64, "block_k": 128, "group_m": 0, "num_warps": 4, "num_stages": 2}
    trials = tmp_path / "trials.json"
    trials.write_text(json.dumps([{"path": "bf16", "tokens": 64, "block_m": 16, "gate_up": tile, "down": tile}]))
    arguments = ("--trials", str(trials))
    monkeypatch.setattr(store, "TABLES", tmp_path / "tables")
    result = tune(*arguments)
    assert result.exit_code == 0, result.output
    assert "fastest" in result.stdout
    record = json.loads(tune(*arguments, "--json").stdout)
    assert [trial["layer_us"] for trial in record["trials"]] == [128.0]
    assert record["device"] == {"name": "AMD Instinct MI300X"}
    assert not (tmp_path / "tables").exists()
    kept = tune(*arguments, "--keep", "--out", str(tmp_path / "mine"))
    assert kept.exit_code == 0, kept.output
    assert "1 of 1 trials written to" in kept.stderr
    (written,) = store.read_table(tmp_path / "mine", Target.GFX942, Stage.GATE_UP).measurements
    assert [row.layer_microseconds for row in written.rows] == [128.0]
    monkeypatch.setattr(Bench, "layer", lambda *_: Timed(1.0, "wrong: 3.0 dB from the oracle"))
    assert tune(*arguments).exit_code == 1
    trials.write_text("{}")
    assert tune(*arguments).exit_code == 2


@pytest.mark.usefixtures("_mi300x")
@pytest.mark.parametrize("option", [("--part", "1/2"), ("--tokens", "64"), ("--again",), ("--to-vllm", "tiles")])
def test_options_of_a_search_do_not_go_with_trials(tmp_path: Path, option: tuple[str, ...]) -> None:
    trials = tmp_path / "trials.json"
    trials.write_text("[]")
    result = tune("--trials", str(trials), *option)
    assert result.exit_code == 2
    assert f"{option[0]} is for a search; with --trials the file says what is timed" in result.stderr


@pytest.mark.usefixtures("_mi300x")
@pytest.mark.parametrize(
    ("options", "words"),
    [(("--keep",), "--keep goes with --trials"), (("--trials", "FILE", "--out", "tables"), "that takes --keep")],
)
def test_what_is_kept_and_where(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    trials = tmp_path / "trials.json"
    trials.write_text("[]")
    result = tune(*(str(trials) if option == "FILE" else option for option in options))
    assert result.exit_code == 2
    assert words in result.stderr
