"""Every example runs as its first line says; each checks its own result."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_they_are_short() -> None:
    assert len(EXAMPLES) == 5
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 40 for path in EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if path.stem == "transformers_model":
        pytest.importorskip("transformers")
    (said,) = re.findall(r"`(.+?)`", path.read_text(encoding="utf-8").splitlines()[0])
    program, *arguments = shlex.split(said)
    assert arguments[-1] == f"examples/{path.name}"
    if program == "torchrun":
        assert len(torchrun(arguments).splitlines()) == 2  # one a rank
        return
    assert program == "python"
    assert len(arguments) == 1
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def torchrun(arguments: list[str]) -> str:
    settings = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
