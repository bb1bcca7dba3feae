from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from epfuse.bench.contender import ContenderKind
from epfuse.bench.layers import LAYERS
from epfuse.bench.read_record import read_record
from epfuse.bench.record import BenchRow, to_text
from epfuse.errors import ConfigError
from tests.bench.records import peer, record, row

FULL = record(
    row(),
    row("bf16", us=None, weights="dense", failure="the result is wrong", wrong=True),
    peer("torch grouped_mm", 400.0),
    peer("vLLM Marlin", 250.0),
    peer("transformers eager", None, failure="RuntimeError", relative_error=None),
)


def test_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text(to_text(FULL))
    assert read_record(file) == FULL


def test_round_trip_without_a_clamp(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    silu = record(row(), layer=LAYERS["qwen3-235b"])
    file.write_text(to_text(silu))
    assert json.loads(file.read_text())["layer"]["activation"]["limit"] is None
    assert math.isinf(read_record(file).layer.activation.limit)


def test_an_error_that_is_not_finite_is_null() -> None:
    assert row(relative_error=math.inf).to_json()["relative_error"] is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is wrong at the top: Invalid JSON"),
        ("[]", "is wrong at the top"),
        ('{"format": "epfuse-bench-9"}', r"is wrong at format.*it must be 'epfuse-bench-1'"),
        ('{"format": "epfuse-bench-1"}', "is wrong at"),
        (to_text(FULL).replace('"hidden": 6144', '"hidden": 0'), "LayerShape.hidden is 0"),
        (to_text(FULL).replace('"median_us"', '"median"'), "is wrong at rows.0.time"),
    ],
)
def test_refuses(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "record.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_record(file)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        read_record(tmp_path / "none.json")


def test_ratios() -> None:
    ours, _, torch_peer, marlin, _ = FULL.rows
    assert ours.over_floor == pytest.approx(1.5)
    assert FULL.best_peer("uniform", 64) is marlin
    assert FULL.over_best_peer(ours) == pytest.approx(300 / 250)
    assert FULL.over_best_peer(torch_peer) is None
    assert record(row()).over_best_peer(row()) is None


@pytest.mark.parametrize(
    ("case", "ok"),
    [
        (row(), True),
        (row(us=None, failure="RuntimeError"), False),
        (peer("vLLM Marlin", None, failure="RuntimeError"), True),
        (peer("vLLM Marlin", None, failure="the result is wrong", wrong=True), False),
    ],
)
def test_ok(case: BenchRow, ok: bool) -> None:
    assert case.ok is ok
    assert record(row(tokens=1), case).ok is ok


def test_labels() -> None:
    assert row().label == "w8a16 fragment"
    assert row("block_fp8", weights="block_fp8", kind=ContenderKind.PATH).label == "block_fp8"
