"""One word, one meaning: no two classes of src and tools have one name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SAME_SENSE = {
    "Occupancy": ("src/epfuse/aot/amdgcn.py", "src/epfuse/aot/sass.py"),
    "Resources": ("src/epfuse/aot/amdgcn.py", "src/epfuse/aot/sass.py"),
}
"""Twins that mean the same of two instruction sets; callers name them with their module, ``sass.Resources``."""


def classes(root: Path) -> dict[str, tuple[str, ...]]:
    """Every class of the package and the tools, wherever it is defined -> the files that have it, one for each time."""
    found = defaultdict(list)
    for folder in ("src", "tools"):
        for file in sorted((root / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    found[node.name].append(file.relative_to(root).as_posix())
    return {name: tuple(files) for name, files in found.items()}


def shared(found: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The names that more than one class has."""
    return {name: files for name, files in found.items() if len(files) > 1}


def test_no_two_classes_share_a_name() -> None:
    """A name that comes twice needs another word, or a line and a reason above."""
    assert shared(classes(ROOT)) == SAME_SENSE


def test_path_has_no_other_name() -> None:
    """`epfuse.Path` and `pathlib.Path`, where one file wants both; an alias would be a third word."""
    for folder in ("src", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = node.names if isinstance(node, ast.ImportFrom) else []
                assert not any(name.name == "Path" and name.asname for name in names), file


def test_a_second_class_of_a_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "tools").mkdir()
    (tmp_path / "src" / "one.py").write_text("class Row:\n    class Cell: ...\n")
    (tmp_path / "tools" / "two.py").write_text("def make():\n    class Cell: ...\n")
    assert shared(classes(tmp_path)) == {"Cell": ("src/one.py", "tools/two.py")}
