"""DESIGN.md's picture of the house is the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DESIGN = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "src" / "epfuse"


def picture() -> dict[str, str]:
    """Every entry below ``src/epfuse/`` -> what the picture says of it, its further lines included."""
    found, name = {}, ""
    block = DESIGN.split("## The house")[1].split("```")[1]
    for line in block.split("src/epfuse/\n")[1].split("\ntests/")[0].splitlines():
        entry = re.match(r"  (\S+)\s+(.*)", line)
        if entry and not line.startswith("   "):
            name = entry[1]
            found[name] = entry[2]
        else:
            found[name] += " " + line.strip()
    return found


def test_every_entry_is_in_the_tree_and_every_package_and_module_has_one() -> None:
    tree = {
        f"{found.name}/" if found.is_dir() else found.name
        for found in PACKAGE.iterdir()
        if (found / "__init__.py").exists() or (found.suffix == ".py" and not found.name.startswith("__"))
    }
    assert set(picture()) == tree


@pytest.mark.parametrize(("entry", "words"), [(entry, words) for entry, words in picture().items() if entry[-1] == "/"])
def test_files_and_folders_that_an_entry_names_exist(entry, words) -> None:
    """Of stages, files that every stage has lie a folder deeper."""
    for name in re.findall(r"[\w*]+(?:\.py|/)", words.split("(docs/")[0]):
        places = [PACKAGE / entry, *(PACKAGE / entry).glob("*/")] if entry == "stages/" else [PACKAGE / entry]
        assert any(list(place.glob(name)) for place in places), f"{entry} has no {name}"


def test_what_stands_beside_the_package_exists() -> None:
    block = DESIGN.split("## The house")[1].split("```")[1]
    for name in re.findall(r"^(\w+/)", block, re.MULTILINE):
        assert (ROOT / name).is_dir()


def test_every_file_that_the_text_names_exists() -> None:
    """By its path in the repository, in the package or in a package of it; a bare name is some file's."""
    everywhere = {file.name for file in PACKAGE.rglob("*.py")}
    for name in set(re.findall(r"`([\w/]+\*?\.(?:py|md))`", DESIGN)):
        bare = any(Path(file).match(name) for file in everywhere)
        assert (ROOT / name).exists() or (PACKAGE / name).exists() or ("/" not in name and bare), name


def test_families_that_the_text_names_exist() -> None:
    from epfuse.families.registry import NAMES

    text = DESIGN.split("## Paths and kernels")[1].split("\n| path |")[0]
    named = set(re.findall(r"`((?:sm90|portable|cpu)\w*)`", text))
    assert named
    assert named <= set(NAMES)
