"""Records from outside: 300 mutations of a valid one are read or refused, never anything else."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from epfuse.bench.compare import compare_records
from epfuse.bench.contender import Absent
from epfuse.bench.page import bench_page
from epfuse.bench.read_record import read_record
from epfuse.bench.record import to_text
from epfuse.config import Bias
from epfuse.errors import ConfigError
from tests.bench.records import peer, record, row
from tests.mutations import mutated_bytes, mutated_values

NOW = record(row(), row("bf16", us=None), peer("vLLM Marlin", 250.0))
RUN = {"clocks": {"at the start": {"sm_mhz": 1.0, "driver": "5"}, "then": None}, "versions": {"vllm": None}}
THEN = record(*NOW.rows, run=NOW.run | RUN | {"commit": {"hash": "0" * 40, "changed": False}})


@pytest.mark.parametrize("part", range(3))
def test_a_mutated_record_is_read_in_full_or_refused(tmp_path: Path, part: int) -> None:
    """What is read can be compared and shown: nothing is left to fail after minutes of measurement."""
    file, read = tmp_path / "record.json", 0
    values = json.loads(to_text(THEN))
    for text in [*mutated_values(values, 80, seed=part), *mutated_bytes(to_text(THEN).encode(), 20, seed=part)]:
        file.write_bytes(text)
        with contextlib.suppress(ConfigError):
            before = read_record(file)
            if (before.layer.shape, before.layer.activation) == (NOW.layer.shape, NOW.layer.activation):
                comparison = compare_records(before, NOW)
                json.dumps(comparison.to_json(), allow_nan=False)
                if read < 3:
                    bench_page(NOW, comparison)
                read += 1
    assert read > 3  # else the mutations are too coarse to say anything


def test_biases_are_read_and_a_record_of_before_they_were_said_has_none(tmp_path: Path) -> None:
    biased = replace(NOW, layer=replace(NOW.layer, bias=Bias.ADDED))
    (tmp_path / "record.json").write_text(to_text(biased))
    assert read_record(tmp_path / "record.json").layer.bias is Bias.ADDED
    values = json.loads(to_text(NOW))
    assert values["layer"].pop("bias") == "none"
    (tmp_path / "record.json").write_text(json.dumps(values))
    assert read_record(tmp_path / "record.json").layer == NOW.layer


def test_two_rows_of_one_point_are_refused(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(to_text(record(row(us=100), row(us=200))))
    with pytest.raises(ConfigError, match="two rows are of one contender"):
        read_record(tmp_path / "record.json")


@pytest.mark.parametrize("name", ["wrong", "time", "block_m"])
def test_a_row_that_lacks_a_field_is_refused(tmp_path: Path, name: str) -> None:
    values = json.loads(to_text(THEN))
    del values["rows"][0][name]
    (tmp_path / "record.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"wrong at rows\.0: .*it has no {name}"):
        read_record(tmp_path / "record.json")


@pytest.mark.parametrize("at", [("rows", 0), ("rows", 0, "time"), ("roofs", "read"), ("absent", 0)])
def test_a_field_that_nothing_has_is_refused(tmp_path: Path, at: tuple[str | int, ...]) -> None:
    values = part = json.loads(to_text(replace(THEN, absent=[Absent("humming", "not installed")])))
    for key in at:
        part = part[key]
    part["wrnog"] = 1
    (tmp_path / "record.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="wrnog"):
        read_record(tmp_path / "record.json")


def test_a_row_with_neither_a_time_nor_a_failure_is_refused(tmp_path: Path) -> None:
    values = json.loads(to_text(THEN))
    values["rows"][0]["time"] = None
    (tmp_path / "record.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="must have a time or a failure, and not both"):
        read_record(tmp_path / "record.json")


def test_a_name_that_would_steer_a_terminal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(to_text(record(row("\x1b[2J"))))
    with pytest.raises(ConfigError, match=r"rows\.0\.contender"):
        read_record(tmp_path / "record.json")


def test_a_record_without_an_end_is_left() -> None:
    with pytest.raises(ConfigError, match="more than"):
        read_record(Path("/dev/zero"))
