"""The picture of a peers' record: drawn, or refused in our own words."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tools.draw_peers import chart_of, main

from epfuse.errors import ConfigError
from tests.mutations import mutated_values

RECORD = Path(__file__).parents[2] / "docs" / "records" / "2026-11-26-h200-peers.json"


def test_draws(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [str(RECORD), str(tmp_path / "p.svg")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "p.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', '{"device": "x", "read_tb_s": 0}'])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    done = CliRunner().invoke(main, [str(tmp_path / "r.json"), str(tmp_path / "p.svg")])
    assert done.exit_code == 2
    assert done.stderr.startswith("epfuse: ")
    assert not (tmp_path / "p.svg").exists()


def test_mutated_records_are_drawn_or_refused() -> None:
    values = json.loads(RECORD.read_text())
    values["rows"] = [row | {"sweep": None} for row in values["rows"][:4]]
    drawn = 0
    for text in mutated_values(values, 100, seed=0):
        with contextlib.suppress(ConfigError):
            assert chart_of(json.loads(text)).curves
            drawn += 1
    assert drawn > 10
