"""The sdist has every file of the repository, so that its own tests pass where it is unpacked."""

from __future__ import annotations

import fnmatch
import subprocess
import tomllib
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
SDIST = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"][
    "sdist"
]
ALWAYS = {"pyproject.toml"}  # hatchling puts it there unasked


def test_has_every_file_that_git_has() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"git can't list the files: {listed.stderr.strip()}")
    tops = {PurePosixPath(name).parts[0] for name in listed.stdout.split("\0") if name} - ALWAYS
    missing = {top for top in tops if not any(fnmatch.fnmatch(f"/{top}", pattern) for pattern in SDIST["include"])}
    assert not missing
    assert "exclude" not in SDIST


@pytest.mark.parametrize("pattern", SDIST["include"])
def test_what_it_names_exists(pattern: str) -> None:
    assert list(ROOT.glob(pattern.lstrip("/")))
