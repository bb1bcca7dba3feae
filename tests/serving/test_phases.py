"""Phases of a run's traces: the table of six points, and profiles that are none."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from epfuse.cli.main import main
from epfuse.errors import ConfigError
from epfuse.serving.layout import LegFolder, RunFolder
from epfuse.serving.page import serve_page
from epfuse.serving.phases import UNCLASSIFIED, phase_table, read_phases
from epfuse.serving.record import collect
from tests.serving.runs import make_run

PROFILE = {
    "trace": "t",
    "window": [3, 4],
    "phases": [
        {"name": "attention", "calls": 6, "us": 3000.0, "share": 0.3, "kernels": []},
        {"name": "expert GEMM 1", "calls": 4, "us": 9000.0, "share": 0.6, "kernels": []},
    ],
    "unclassified": [{"name": "k", "calls": 1, "us": 500.0, "rule": ""}, {"name": "l", "calls": 1, "us": 300.0}],
}


def profile(leg: LegFolder, scale: float = 1.0, **changes: object) -> None:
    content: dict[str, Any] = copy.deepcopy(PROFILE) | changes
    for phase in content["phases"]:
        phase["us"] *= scale
    leg.profile.write_text(json.dumps(content))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Six points of two arms, each leg with a trace; the larger the point, the longer its steps."""
    made = make_run(tmp_path, pairs=2)
    for number, name in enumerate(made.read_run().points, 1):
        for path in made.point(name).path.glob("attempts/*/leg-*"):
            profile(LegFolder(path), number * (2 if "candidate" in path.name else 1))
    return made


def cells(page: str) -> list[list[str]]:
    """Texts of the phases' table."""
    table = re.search(r'<table class="phases">(.*?)</table>', page, re.DOTALL)
    assert table is not None
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table[1], re.DOTALL)
    return [
        [re.sub(r"<[^>]+>", " ", cell).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in rows
    ]


def test_the_page_has_the_phases_of_six_points(run: RunFolder) -> None:
    page = serve_page(collect(run), 1.8e9)
    head, *rows = cells(page)
    assert len(head) == 1 + 6 * 2
    assert head[1:3] == ["1k1k c1 tp8 baseline", "1k1k c1 tp8 candidate"]
    assert head[-1] == "8k1k c256 tp8 ep8 candidate"
    found = {row[0]: row[1:] for row in rows}
    assert list(found) == ["attention", "expert GEMM 1", UNCLASSIFIED, "all kernels", "steps traced"]
    assert found["expert GEMM 1"][:2] == ["4.5", "9"]  # milliseconds of one of two steps
    assert found["expert GEMM 1"][-1] == "54"
    assert found[UNCLASSIFIED] == ["0.4"] * 12
    assert found["all kernels"][0] == "6.4"
    assert set(found["steps traced"]) == {"2"}
    assert page.count("<b>4.5</b>") == 1
    assert 'title="2 calls a step"' in page


def test_a_point_without_a_trace_has_no_column(run: RunFolder) -> None:
    name = run.read_run().points[0]
    for path in run.point(name).path.glob("attempts/*/leg-*"):
        LegFolder(path).profile.unlink()
    assert len(cells(serve_page(collect(run), 1.8e9))[0]) == 1 + 5 * 2


def test_a_phase_that_some_points_lack_is_an_empty_cell(tmp_path: Path) -> None:
    leg = LegFolder(tmp_path)
    profile(leg)
    whole = read_phases(leg.profile)
    profile(leg, phases=[*PROFILE["phases"][:1], {"name": "combine", "calls": 2, "us": 2.0}], unclassified=[])
    rows = phase_table([whole, read_phases(leg.profile)])
    assert [row.name for row in rows] == ["attention", "expert GEMM 1", "combine", UNCLASSIFIED]
    assert [[cell is not None for cell in row.cells] for row in rows] == [[1, 1], [1, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ('{"phases": [], "unclassified": []}', "window"),
        (json.dumps(PROFILE | {"window": []}), "window"),
        (json.dumps(PROFILE | {"phases": [{"name": "a", "calls": 1, "us": float("nan")}]}), "NaN"),
        (json.dumps(PROFILE | {"phases": [{"name": "a", "calls": 1, "us": "long"}]}), "us"),
        (json.dumps(PROFILE | {"phases": [{"name": "a", "calls": -1, "us": 1}]}), "calls"),
        (json.dumps(PROFILE | {"phases": [{"calls": 1, "us": 1}]}), "name"),
    ],
)
def test_a_profile_that_is_none_is_refused_by_file_and_key(tmp_path: Path, text: str, words: str) -> None:
    leg = LegFolder(tmp_path)
    leg.profile.write_text(text)
    with pytest.raises(ConfigError, match=words) as raised:
        read_phases(leg.profile)
    assert "profile.json" in str(raised.value)


def test_a_torn_profile_is_said_and_costs_nothing_else(run: RunFolder) -> None:
    first = next(iter(sorted(run.point(run.read_run().points[0]).path.glob("attempts/*/leg-1-*"))))
    LegFolder(first).profile.write_text("{")
    record = collect(run)
    assert not record.ok
    assert "profile.json" in record.points[0].legs[0].fault
    assert record.points[0].legs[0].measured is not None
    assert len(cells(serve_page(record, 1.8e9))[0]) == 1 + 6 * 2  # another leg of the arm has one


def test_the_record_has_them(run: RunFolder, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = CliRunner().invoke(main, ["serve", "report", str(run.path), "--html", str(page), "--json"])
    assert done.exit_code == 0, done.output
    leg = json.loads(done.stdout)["points"][0]["legs"][0]
    assert leg["phases"]["steps"] == 2
    assert leg["phases"]["phases"][1] == {"name": "expert GEMM 1", "calls": 2.0, "ms": 4.5}
    assert leg["files"]["profile"].endswith("profile.json")
