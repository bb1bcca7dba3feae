"""The files that CONTRIBUTING.md sends people to are there, and so are the names that it finds in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = sorted(set(re.findall(r"`((?:src|tests|examples|docs|tools)/[\w./]+)`", TEXT)))


def test_it_names_files() -> None:
    assert len(FILES) > 20


@pytest.mark.parametrize("name", [name for name in FILES if not re.search("NAME|TARGET", name)])
def test_file_exists(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("REFERENCES", "src/epfuse/stages/activation_reference.py"),
        ("Activation", "src/epfuse/config.py"),
        ("FORMATS", "src/epfuse/weights/formats.py"),
        ("Projections", "src/epfuse/weights/projections.py"),
        ("NAMES", "src/epfuse/families/registry.py"),
        ("TARGETS", "src/epfuse/cli/aot.py"),
        ("WeightFormat", "src/epfuse/config.py"),
        ("Target", "src/epfuse/target.py"),
    ],
)
def test_name_is_in_its_file(name: str, file: str) -> None:
    assert f"`{name}`" in TEXT
    assert file in FILES
    assert re.search(rf"^(class )?{name}\b", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
