"""docs/parallel.md: its program runs, and what it quotes exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from epfuse.cli.main import main
from epfuse.parallel import exchange

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "docs" / "records"
PAGE = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")


def test_its_program_runs(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "program.py").write_text(program + "    print(y.shape, bool(y.isfinite().all()))\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    settings |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": str(port)}
    command = [sys.executable, "program.py"]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([5, 64]) True\n"


def test_its_modes_are_all_of_them() -> None:
    modes = {
        name
        for name, value in vars(exchange).items()
        if isinstance(value, type) and issubclass(value, exchange.Exchange) and value is not exchange.Exchange
    }
    table = PAGE.partition("## Modes")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == modes


def test_its_figures_are_the_records() -> None:
    verified = json.loads((RECORDS / "2026-11-30-h200x2-verify.json").read_text())
    assert verified["cases"] == verified["passed"] == verified["passed_again"]
    assert f"All {verified['cases']} cases passed" in " ".join(PAGE.split())
    ordered, atomic = verified["digests"]["deterministic"], verified["digests"]["atomic"]
    bits = f"all {ordered['compared']} are equal where routes are summed in order, and {atomic['equal']} of"
    assert ordered["equal"] == ordered["compared"]
    assert bits in " ".join(PAGE.split())
    alike: dict[tuple[str, ...], list[dict]] = {}
    for row in verified["rows"]:
        alike.setdefault((row["path"], row["weights"], row["combine"]), []).append(row)
    for (path, weights, combine), rows in alike.items():
        passed, whole = (sum(row[key] for row in rows) for key in ("passed", "cases"))
        error, snr = max(row["relative_error"] for row in rows), min(row["snr_db"] for row in rows)
        assert f"| `{path}` | {weights} | {combine} | {passed} of {whole} | {error:.2e} | {snr:.1f} |" in PAGE
    for row in json.loads((RECORDS / "2026-11-30-h200x2-bench.json").read_text())["rows"]:
        times = {name: timing["median_us"] for name, timing in row["sums"].items()}
        steps = {name: timing["median_us"] for name, timing in row["exchanges"].items()}
        if row["failure"]:
            assert not times
            continue
        share = max(timing["median_us"] for timing in row["shard"])
        own = [share, *times.values(), steps["all_reduce float32"], steps["all_reduce partials"]]
        rest = [steps[name] for name in ("reduce_scatter", "all_gather", "dispatch")]
        first, last = (" | ".join(shown(value) for value in values) for values in (own, rest))
        cells = (
            f"`{row['path']}` | {row['tokens']} | {row['imbalance']:.2f} | {first} | {row['over_parts']:.3f} | {last}"
        )
        assert f"| {cells} |" in PAGE


def shown(microseconds: float) -> str:
    return f"{microseconds:.0f}" if microseconds >= 100 else f"{microseconds:.1f}"


def test_its_commands_have_the_options_that_it_names() -> None:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    found = [shlex.split(line.partition("epfuse ")[2]) for line in lines if " epfuse " in f" {line}"]
    assert found
    for name, *words in found:
        shown = CliRunner().invoke(main, [name, "--help"]).output
        for option in (word for word in words if word.startswith("--")):
            assert option in shown
