"""``epfuse demo`` with real processes: good, with a wrong shard, and with a rank that dies."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("jinja2")

from epfuse import input_file
from epfuse.cli.demo import demo
from epfuse.demo import page, run
from epfuse.report import write
from epfuse.weights.checkpoint import save_checkpoint


def invoke(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(demo, ["--ranks", "2", "--tokens", "64", "--html", str(folder / "page.html"), *options])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("demo")
    text = folder / "<notes>.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 4)
    result = invoke(folder, "--json", "--text", str(text))
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), (folder / "page.html").read_text()


def test_all_checks_pass(good: tuple[dict[str, Any], str]) -> None:
    record, _ = good
    assert record["passed"]
    assert len(record["checks"]) == 12
    assert len(record["ranks"]) == 2
    assert record["text"]["tokens"] <= 64
    for layer in record["layers"]:
        assert sum(layer["useful_rows"]) == layer["routes"] == record["text"]["tokens"] * 4
        assert all(row % record["block_m"] == 0 for row in layer["padded_rows"])
        assert layer["global_rows"] > max(layer["padded_rows"])


def test_each_rank_holds_its_share_only(good: tuple[dict[str, Any], str]) -> None:
    record, _ = good
    size, width = record["settings"]["size"], 4 if record["settings"]["dtype"] == "float32" else 2
    share = 3 * size["hidden"] * size["intermediate"] * size["experts"] // 2 * size["moe_layers"] * width
    assert [rank["expert_bytes"] for rank in record["ranks"]] == [share, share]


def test_mxfp8_experts_pass_every_check_at_their_bytes(tmp_path: Path) -> None:
    result = invoke(tmp_path, "--json", "--dtype", "float32", "--weights", "mxfp8")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["settings"]["weights"] == "mxfp8"
    verdicts = {check["name"]: check["verdict"] for check in record["checks"]}
    assert set(verdicts.values()) == {"passed"}
    size = record["settings"]["size"]
    values = 3 * size["hidden"] * size["intermediate"] * size["experts"] // 2 * size["moe_layers"]
    assert [rank["expert_bytes"] for rank in record["ranks"]] == [values * 33 // 32] * 2


def test_page_is_self_contained_and_escaped(good: tuple[dict[str, Any], str]) -> None:
    _, page = good
    assert page.count("<svg") == 4
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert "&lt;notes&gt;.txt" in page
    assert "<notes>" not in page


def test_bfloat16_passes_by_its_own_bounds(tmp_path: Path) -> None:
    result = invoke(tmp_path, "--json", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    verdicts = {check["name"]: check["verdict"] for check in json.loads(result.stdout)["checks"]}
    assert verdicts["greedy tokens = the untouched model's"] == "informative"


def test_a_wrong_shard_fails_with_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap_two_experts(model: nn.Module, path: Path) -> None:
        weight = model.get_submodule("model.layers.2.mlp.experts").down_proj
        with torch.no_grad():
            weight[[0, 127]] = weight[[127, 0]]
        save_checkpoint(model, path)

    monkeypatch.setattr(run, "save_checkpoint", swap_two_experts)
    result = invoke(tmp_path, "--tokens", "128")
    assert result.exit_code == 1
    assert re.search(r"layer 2: ranks' sum = transformers' experts .*failed", result.stdout)
    assert re.search(r"layer 1: ranks' sum = transformers' experts .*passed", result.stdout)
    assert "a check failed" in result.stdout
    assert "a check failed" in (tmp_path / "page.html").read_text()


def test_a_rank_that_dies_is_named_and_exits_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "save_checkpoint", lambda model, path: save_checkpoint(model.model.layers[0], path))
    result = invoke(tmp_path)
    assert result.exit_code == 1
    assert re.search(r"rank \d of 2 failed: \w", result.stderr)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--ranks", "3"),
        ("--ranks", "0"),
        ("--ranks", "-1"),
        ("--ranks", "256"),
        ("--ranks", str(10**20)),
        ("--tokens", "0"),
        ("--tokens", "2147483648"),
        ("--tokens", str(10**20)),
        ("--seed", "-1"),
        ("--dtype", "int8"),
        ("--text", "{folder}/missing"),
        ("--text", "{folder}"),
        ("--text", "/dev/zero"),
        ("--text", "/dev/null"),
        ("--text", "{folder}/fifo"),
        ("--html", "{folder}/missing/page.html"),
        ("--html", "{folder}"),
    ],
)
def test_usage_errors_exit_2_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, str]
) -> None:
    monkeypatch.setattr(run, "build_model", None)
    monkeypatch.setattr(input_file, "PATIENCE", 0.1)
    os.mkfifo(tmp_path / "fifo")
    option, value = options
    result = invoke(tmp_path, option, value.format(folder=tmp_path))
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert option.strip("-").partition(" ")[0] in result.stderr
    assert not (tmp_path / "page.html").exists()


def test_ranks_that_the_limit_of_open_files_refuses_exit_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "build_model", None)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (64, 64))
    result = invoke(tmp_path, "--ranks", "128")
    assert result.exit_code == 2
    assert re.search(r"ranks is 128; that takes \d+ open files a process, and 64 are allowed", result.stderr)


def test_a_full_disk_costs_no_result(
    good: tuple[dict[str, Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_demo", lambda settings, text: Recorded(good[0]))
    monkeypatch.setattr(page, "demo_page", lambda record: "a page")

    def full(path: Path, data: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "write_atomic", full)
    result = invoke(tmp_path, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout) == good[0]
    assert "--html could not be written: [Errno 28] No space left on device" in result.stderr


def test_no_folder_for_temporary_files_exits_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    result = invoke(tmp_path)
    assert result.exit_code == 2
    assert "missing" in result.stderr


class Recorded:
    """A record that was made before."""

    passed = True

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def as_json(self) -> dict[str, Any]:
        return self.content


def test_help_has_an_example() -> None:
    result = CliRunner().invoke(demo, ["--help"])
    assert result.exit_code == 0
    assert "epfuse demo --ranks 4" in result.stdout


def test_missing_transformers_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find_spec(name))
    result = invoke(tmp_path)
    assert result.exit_code == 2
    assert "epfuse[demo]" in result.stderr
