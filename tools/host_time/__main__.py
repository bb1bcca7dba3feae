"""Microseconds of the host for one eager call, of this epfuse beside other versions', in turns.

    python -m tools.host_time --json host-time.json --beside c8dab68=.base          on a GPU, MiniMax-M3 under EP8
    python -m tools.host_time --stub --json host-time.json --beside c8dab68=.base   without one

A folder beside is what ``git archive COMMIT src`` gives. Every version and kind of call has a process of its own, which
compiles its kernels first; then one after another measures, round by round. The host's time is that of calls in a row,
without a wait for the device. With ``--stub`` nothing is launched (`tools.host_time.stub`), and the layer is small.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import torch

from epfuse.bench.machine import describe_device, run_facts
from epfuse.children import Children
from epfuse.errors import ConfigError
from epfuse.report.write import write_atomic

ROOT = Path(__file__).parents[2]
CASES = (
    ("w8a16", 16, "own"),
    ("w8a16", 16, "brought"),
    ("w8a16", 1024, "own"),
    ("w8a16", 1024, "brought"),
    ("w8a8", 64, "own"),
    ("w8a8", 64, "brought"),
)
"""Path, tokens, and whether out and the scratch are the call's own or brought: few rows, packed rows, FP8 rows."""


class Measurer:
    """A process that measures one kind of calls of one version."""

    def __init__(self, children: Children, version: str, source: Path, case: tuple[str, int, str], stub: bool) -> None:
        self.version, self.case = version, case
        self.us: list[float] = []
        path, tokens, memory = case
        folders = (str(source), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]))  # own first
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.host_time.worker", path, str(tokens), memory, "stub" if stub else "gpu"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(folders), "EPFUSE_LAUNCH_PLANS": "1"},
            cwd=source,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=children.id,
        )
        self.python_calls = 0

    def wait(self) -> None:
        """Until its kernels are compiled."""
        self.python_calls = int(self._answer()["python_calls"])

    def measure(self) -> None:
        """One round."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.us.append(float(self._answer()["us"]))

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError(f"{self.version} {self.case} ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def row(self) -> dict[str, Any]:
        """What was measured."""
        path, tokens, memory = self.case
        return {
            "version": self.version,
            "path": path,
            "tokens": tokens,
            "memory": memory,
            "python_calls": self.python_calls,
            "us": round(statistics.median(self.us), 2),
            "rounds_us": [round(us, 2) for us in self.us],
        }


def named_folders(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    """``NAME=FOLDER`` each."""
    found = {}
    for value in values:
        name, equals, folder = value.partition("=")
        source = Path(folder).resolve() / "src"
        if not name or not equals or not (source / "epfuse").is_dir():
            raise click.BadParameter(f"{value!r} is not NAME=FOLDER with src/epfuse in the folder", context, parameter)
        found[name] = source
    return found


@click.command(help=__doc__)
@click.option("--json", "target", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The record.")
@click.option("--beside", multiple=True, metavar="NAME=FOLDER", callback=named_folders, help="Another version.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--stub", is_flag=True, help="On a GPU that launches nothing.")
def main(target: Path, beside: dict[str, Path], rounds: int, stub: bool) -> None:
    """Measure, print, write."""
    sources = {"this": ROOT / "src", **beside}
    with Children() as children:
        workers = []
        for case in CASES:
            started = [Measurer(children, name, source, case, stub) for name, source in sources.items()]
            workers += started
            if stub:  # nothing to compile, and few cores
                for worker in started:
                    worker.wait()
        if not stub:
            for worker in workers:
                worker.wait()
        for _ in range(rounds):
            for worker in workers:
                worker.measure()
    rows = [worker.row() for worker in workers]
    for row in rows:
        print("{path:6} T={tokens:<5} {memory:8} {version:10} {python_calls:5} Python calls {us:8.1f} us".format(**row))
    device = torch.device("cpu") if stub else torch.device("cuda", 0)
    program = ["python", "-m", "tools.host_time"]
    record = run_facts(program, device=describe_device(device), stub=stub, rows=rows)
    write_atomic(target, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
