"""``epfuse aot --execute``: run gfx942's machine code under a model of its instruction set, and judge the results."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

import click

from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.report.terminal import bars, stdout

PARTS = ("share", "all", "none")


def execute(
    cases: str, faults: str, seed: int, workers: int | None, keep: Path | None, as_json: bool, as_markdown: bool
) -> NoReturn:
    """Execute cases and faults, print the record, exit.

    Args:
        cases: of `PARTS`.
        faults: the same.
        seed: draws the share, the numbers and the order in which waves run.
        workers: processes; None for the CPUs.
        keep: folder of results: an earlier run's are taken, new ones are added.
        as_json: JSON in the place of tables.
        as_markdown: Markdown in the place of tables.

    """
    delivery = Delivery(folders={"--keep": keep})
    from epfuse.aot import tables
    from epfuse.aot.isa import gate, inject
    from epfuse.aot.isa.kept import Kept, run_of
    from epfuse.aot.isa.record import ExecutionRecord

    count = workers or len(os.sched_getaffinity(0))
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    kept = Kept(keep, run_of(seed))
    with bars() as progress:
        task = progress.add_task("executing gfx942's code", total=None)
        chosen = [] if cases == "none" else gate.every_case(seed) if cases == "all" else gate.share(seed)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        found = gate.run(chosen, seed, count, kept, show)
        broken = None
        if faults != "none":
            task = progress.add_task("dropping instructions", total=None)
            kernels = inject.subjects() if faults == "all" else inject.share(seed)
            broken = inject.run(kernels, count, kept, show)
    record = ExecutionRecord(seed, found, broken)
    with delivery.of(STDOUT):
        if as_json:
            click.echo(json.dumps(record.to_json(_command()), indent=2, allow_nan=False))
        elif as_markdown:
            click.echo(tables.markdown(record.tables(), _command()), nl=False)
        else:
            tables.show(record.tables(), stdout(160))
    for failure in record.failures():
        click.echo(f"FAIL {failure}", err=True)
    delivery.exit(passed=record.ok)


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
