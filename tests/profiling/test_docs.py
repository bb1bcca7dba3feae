"""docs/profiling.md shows what the command prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from epfuse.cli.main import main
from epfuse.profiling.phases import Phase
from tests.profiling.traces import DATA, MI300X

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "profiling.md").read_text(encoding="utf-8")


def printed(*arguments: str) -> list[str]:
    result = CliRunner().invoke(main, ["profile", *arguments], env={"COLUMNS": "112"})
    assert result.exit_code == 0, result.output
    return [line.rstrip() for line in result.stdout.splitlines()]


def test_the_example_is_what_the_command_prints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(DATA)
    table, experts, compared = re.findall(r"```text\n(.*?)```", TEXT, flags=re.DOTALL)
    picture = tmp_path / "layer.svg"
    assert table.splitlines() == printed(MI300X.name, "--svg", str(picture))
    assert picture.read_text(encoding="utf-8") == (DOCS / "profile-mi300x-layer.svg").read_text(encoding="utf-8")
    lines = printed(MI300X.name, "--shape", "gpt-oss-20b")
    for line in experts.splitlines():  # what is predicted changes with the model, what is counted does not
        assert line in lines or line.startswith("predicted: if these experts were ")
    a, b = (f"h100-{name}-experts.trace.json.gz" for name in ("transformers", "epfuse"))
    assert f"epfuse profile --compare {a} {b}" in TEXT
    assert compared.splitlines() == printed("--compare", a, b)


def test_all_phases_are_named() -> None:
    for phase in Phase:
        assert f"`{phase.value}`" in TEXT
