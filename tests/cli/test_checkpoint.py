"""``epfuse checkpoint``: what was made is what is found, and folders that are none end in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("transformers")

from epfuse.cli.checkpoint.make import FAMILIES
from epfuse.cli.main import main
from epfuse.demo.checkpoint import RECIPES
from epfuse.planning.folder import FolderRecord


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["checkpoint", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_make_knows_every_recipe() -> None:
    assert tuple(RECIPES) == FAMILIES


def test_inspect_finds_what_make_made(tmp_path: Path) -> None:
    out = tmp_path / "made"
    made = run("make", "--family", "minimax_m3_vl", "--experts", "6", "--out", str(out), "--json")
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["format"] == "mxfp8"
    found = run("inspect", str(out), "--ep-size", "4", "--load", "3", "--json")
    assert found.exit_code == 0, found.stderr
    content = json.loads(found.stdout)
    loaded = content.pop("loaded")
    record = FolderRecord.model_validate(content)
    expert = 3 * 256 * 128 * 33 // 32  # E4M3 and a byte for 32 of them
    assert record.bytes == 2 * 6 * expert
    assert [(entry.first, entry.last, entry.experts, entry.bytes) for entry in record.ranks] == [
        (0, 1, 2, 2 * 2 * expert),
        (2, 3, 1, 2 * expert),
    ]
    assert (loaded["rank"], loaded["bytes"]) == (3, 2 * expert)
    assert (record.format, record.naming, record.dtypes) == ("mxfp8", "matrices", {"weight": "F8_E4M3", "scale": "U8"})
    assert {target.target: target.paths for target in record.targets}["sm_90"] == ("w8a16",)
    table = run("inspect", str(out), "--ep-size", "2").stdout
    assert "language_model.model.layers.0.block_sparse_moe.experts" in table
    for words in (["make", "--family", "minimax_m3_vl", "--out", str(out)], ["inspect", str(out), "--load", "8"]):
        refused = run(*words)
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1)


@pytest.mark.parametrize("arguments", [["--top-k", "9"], ["--hidden", "65"], ["--format", "mxfp4"]])
def test_what_can_not_be_made_leaves_nothing(tmp_path: Path, arguments: list[str]) -> None:
    refused = run("make", "--family", "minimax_m3_vl", "--out", str(tmp_path / "made"), *arguments)
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["make", "inspect"])
def test_help_has_an_example(command: str) -> None:
    assert "epfuse checkpoint " in run(command, "--help").stdout
