"""docs/mi300x.sh, which runs where a card is, on a machine that only claims to have one."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "mi300x.sh"


def run(tmp_path: Path, epfuse: str, python: str = "exit 0") -> subprocess.CompletedProcess[str]:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, body in (("epfuse", epfuse), ("python3", python)):
        tool = tools / name
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), "found"]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def steps(tmp_path: Path) -> dict[str, str]:
    lines = (tmp_path / "found" / "steps.txt").read_text().splitlines()
    return dict(line.split("\t")[:2] for line in lines)


@pytest.mark.parametrize(
    ("epfuse", "bench", "code"),
    [
        ('echo "{}"', "0", 0),
        ('if [ "$1" = bench ]; then exit 2; fi; echo "{}"', "-", 0),  # a version without bench
        ('if [ "$1" = verify ]; then exit 1; fi; echo "{}"', "0", 1),
    ],
)
def test_everything_is_in_one_file(tmp_path: Path, epfuse: str, bench: str, code: int) -> None:
    done = run(tmp_path, epfuse)
    assert done.returncode == code, done.stderr
    assert done.stdout.strip() == "found.tar.gz"
    found = steps(tmp_path)
    assert set(found) == {"verify", "verify-minimax-m3", "aot", "bench"}
    assert found["bench"] == bench
    assert found["verify"] == str(code)
    with tarfile.open(tmp_path / "found.tar.gz") as file:
        assert {"found/machine.txt", "found/steps.txt", "found/verify.json", "found/aot.json"} <= set(file.getnames())


def test_refuses_another_gpu(tmp_path: Path) -> None:
    done = run(tmp_path, "exit 0", python="exit 1")
    assert done.returncode == 2
    assert "needs an MI300X or MI325X" in done.stderr
    assert not (tmp_path / "found").exists()
