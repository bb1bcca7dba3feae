"""benchmarks/marks.sh, with a program in place of Python."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/marks.sh"


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    python = folder / "python"
    python.write_text(f'#!/bin/sh\necho "$PYTHONPATH $*" >>{folder}/asked\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "SEED": "1f", "JOBS": "3", "PEER_ROOT": "libraries"}
    done = subprocess.run(
        ["bash", str(SCRIPT), "harness.py", str(folder / "out"), *arguments],
        capture_output=True, text=True, env=environment, cwd=SCRIPT.parents[1], check=False,
    )  # fmt: skip
    asked = folder / "asked"
    return done.returncode, done.stdout + done.stderr, asked.read_text() if asked.exists() else ""


def test_every_part_asks_its_tool_with_what_time_there_is(tmp_path: Path) -> None:
    code, said, asked = run(tmp_path, "300", "peers", "drawn", "shapes", "choice", "counters", "power")
    assert code == 0, said
    peers, drawn, shapes, choice, counters, power = asked.splitlines()
    assert all(line.startswith("libraries:") for line in (peers, drawn, shapes))
    assert all(not line.startswith("libraries:") for line in (choice, counters, power))
    assert "-m tools.beside_peers harness.py" in peers
    assert "--seconds 126" in peers
    assert "--draw 40 --seed 31 --humming 1" in drawn
    assert "--shapes all --draw 6 --seed 31" in shapes
    assert "-m tools.tile_choice" in choice
    assert "--workers 3" in choice
    assert "--points w8a8@1,16," in counters
    assert "-m tools.burst_and_steady" in power
    assert (tmp_path / "out/drawn.txt").exists()


def test_a_part_without_time_is_left_out_and_an_unknown_one_refused(tmp_path: Path) -> None:
    code, said, asked = run(tmp_path, "20", "shapes", "power")
    assert code == 0
    assert "shapes: no time" in said
    assert asked.count("\n") == 1
    assert run(tmp_path, "20", "pears")[0] == 2
