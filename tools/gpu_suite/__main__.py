"""The tests that need a GPU, several rounds in processes side by side, with memory and first errors on record.

    PYTHONPATH=src python3 -m tools.gpu_suite --processes 15 --rounds 3 --json gpu-suite.json
    PYTHONPATH=src python3 -m tools.gpu_suite --rounds 1 --json gpu-suite.json -- tests/stages -k gather

To look for a kernel that reads or writes where it must not:

    ... --rounds 1 --repeat 50 ...         each test often, in all processes
    ... --rounds 1 --fenced ...            tensors end where mapped memory does (no tests that capture graphs)
    ... --rounds 1 --sanitize memcheck ... under compute-sanitizer, a tensor an allocation (few tests: it is slow)

A round is green if pytest is. Of a round that is not, the record has the first error of each process, whether the
device still answered after it, and how much of its memory was free.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
import torch
from tools.gpu_suite.watch import FENCED, FOLDER, REPEAT

from epfuse.bench.machine import describe_device, read_clocks, run_facts
from epfuse.children import Children
from epfuse.errors import ConfigError
from epfuse.report.write import write_atomic

SANITIZER = (
    "compute-sanitizer",
    "--target-processes=all",
    "--error-exitcode=99",
    "--print-limit=20",
    "--launch-timeout=0",
)
COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped)")
EXAMPLE = "Example: PYTHONPATH=src python3 -m tools.gpu_suite --processes 15 --rounds 3 --json gpu-suite.json"


class MemoryWatch:
    """The most memory that was in use, device and host, sampled each half second."""

    def __init__(self) -> None:
        self.device_mib, self.host_mib = 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._stop.wait(0.5):
            answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
            self.device_mib = max([self.device_mib, *(int(word) for word in answer if word.isdigit())])
            lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
            used = int(lines["MemTotal"].split()[0]) - int(lines["MemAvailable"].split()[0])
            self.host_mib = max(self.host_mib, used >> 10)


def run_round(
    processes: int,
    arguments: tuple[str, ...],
    log: Path,
    seconds: float,
    repeat: int = 1,
    fenced: bool = False,
    sanitize: str | None = None,
) -> dict[str, Any]:
    """One run of pytest: counts, first errors, memory, the slowest and the largest tests."""
    with tempfile.TemporaryDirectory() as folder, MemoryWatch() as memory:
        environment = os.environ | {FOLDER: folder, REPEAT: str(repeat)}
        if fenced:
            environment[FENCED] = "1"
        if sanitize:
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        spread = ["-n", str(processes)] if processes > 1 or fenced else []
        command = [
            *([*SANITIZER, f"--tool={sanitize}"] if sanitize else []),
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "tools.gpu_suite.watch",
            *spread,
            *arguments,
        ]
        start = time.monotonic()
        with log.open("w", encoding="utf-8") as output, Children() as children:
            try:
                done = subprocess.run(
                    command,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    check=False,
                    timeout=seconds,
                    process_group=children.id,
                ).returncode
            except subprocess.TimeoutExpired:  # xdist's workers would go on
                done = 124
        took = time.monotonic() - start
        notes = [json.loads(line) for file in Path(folder).iterdir() for line in file.read_text().splitlines()]
    notes.sort(key=lambda note: note["time"])
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("=========")]
    summary = lines[-1] if lines else ""
    first: dict[str, dict[str, Any]] = {}
    for note in notes:
        if "failed" in note:
            first.setdefault(note["worker"], note)
    tests = [note for note in notes if "test" in note]
    return {
        "returncode": done,
        "sanitizer": [line for line in text.splitlines() if line.startswith("=========")][:400],
        "seconds": round(took, 1),
        "counts": {word.rstrip("s"): int(number) for number, word in COUNT.findall(summary)},
        "summary": summary,
        "most_device_memory_mib": memory.device_mib,
        "most_host_memory_mib": memory.host_mib,
        "first_error_of_each_process": list(first.values()),
        "failed": [note["failed"] for note in notes if "failed" in note],
        "largest": sorted(tests, key=lambda note: -note["peak_mib"])[:12],
        "slowest": sorted(tests, key=lambda note: -note["seconds"])[:12],
        "reserved_at_the_end_mib": {note["worker"]: note["reserved_mib"] for note in tests},
    }


@click.command(help=__doc__, epilog=EXAMPLE, context_settings={"ignore_unknown_options": True})
@click.option("--processes", type=click.IntRange(1, 64), default=15, show_default=True, help="Processes side by side.")
@click.option("--rounds", type=click.IntRange(1, 10), default=3, show_default=True, help="How often all of it runs.")
@click.option("--seconds", type=click.FloatRange(1), default=560.0, show_default=True, help="Limit of all rounds.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True, help="The record.")
@click.option(
    "--repeat", type=click.IntRange(1, 10_000), default=1, show_default=True, help="How often each test runs."
)
@click.option("--fenced", is_flag=True, help="Tensors end where mapped memory does.")
@click.option(
    "--sanitize",
    type=click.Choice(["memcheck", "racecheck", "initcheck", "synccheck"]),
    help="Under compute-sanitizer.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(
    processes: int,
    rounds: int,
    seconds: float,
    json_file: Path,
    repeat: int,
    fenced: bool,
    sanitize: str | None,
    arguments: tuple[str, ...],
) -> None:
    """Run the rounds, write the record after each, exit with 1 unless all were green."""
    if not torch.cuda.is_available():
        raise click.UsageError("no GPU is visible to torch; these tests need one")
    device = torch.device("cuda", 0)
    end = time.monotonic() + seconds
    about = {"device": describe_device(device), "clocks": read_clocks(device)}
    record = run_facts(["python", "-m", "tools.gpu_suite"], **about, rounds=[])
    torch.cuda.empty_cache()
    for number in range(1, rounds + 1):
        left = end - time.monotonic()
        if left < 30:
            click.echo(f"round {number} not started: {left:.0f} s are left")
            break
        log = json_file.with_suffix(f".round-{number}.log")
        found = run_round(processes, arguments, log, left, repeat, fenced, sanitize)
        record["rounds"].append(found)
        write_atomic(json_file, json.dumps(record, indent=1) + "\n")
        click.echo(
            f"round {number}: rc {found['returncode']}, {found['seconds']} s, {found['summary']}\n"
            f"  most memory: device {found['most_device_memory_mib']} MiB, host {found['most_host_memory_mib']} MiB"
        )
        for note in found["first_error_of_each_process"]:
            click.echo(
                f"  {note['worker']} {note['when']} {note['failed']}: {note['error'][:300]}"
                f" (device {note['device_after']}, {note['free_mib']} MiB free)"
            )
    if len(record["rounds"]) < rounds or any(found["returncode"] for found in record["rounds"]):
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
