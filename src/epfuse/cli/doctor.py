"""``epfuse doctor``: what is found on this machine, what of it is wrong, and what mends it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from epfuse import __version__
from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.report.terminal import Console, bars

if TYPE_CHECKING:
    from epfuse.doctor.finding import Diagnosis

REPORT_COLUMNS = 80
COLOURS = {"good": "green", "warning": "yellow", "bad": "bold red"}


EPILOG = """\b
Examples:
  epfuse doctor
  epfuse doctor --report > report.txt
"""


@click.command(epilog=EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print the diagnosis as JSON.")
@click.option("--report", is_flag=True, help="Print one block of plain text for a bug report.")
def doctor(as_json: bool, report: bool) -> None:
    """Say what epfuse finds on this machine, what of it is wrong, and what mends it.

    Each line is good, a warning (it works, but slower or with less) or bad. The last one is a real call, on the GPU or
    else on the CPU, compared with float64. Nothing is sent anywhere; host names, names of people, paths of homes and
    tokens are left out of every output. Exit code 1 if anything is bad.
    """
    if as_json and report:
        raise click.UsageError("--json and --report are two forms of one output; give one of them")
    from epfuse.doctor.checks import CHECKS
    from epfuse.doctor.examine import examine
    from epfuse.doctor.finding import Diagnosis

    delivery = Delivery()
    findings = []
    with bars() as progress:
        task = progress.add_task(CHECKS[0].name, total=len(CHECKS))
        for following, finding in enumerate(examine(CHECKS), 1):
            findings.append(finding)
            name = CHECKS[following].name if following < len(CHECKS) else "done"
            progress.update(task, completed=following, description=name)
    diagnosis = Diagnosis(epfuse=__version__, findings=tuple(findings))
    with delivery.of(STDOUT):
        if as_json:
            click.echo(diagnosis.model_dump_json(indent=2))
        elif report:
            click.echo(block(diagnosis), nl=False)
        else:
            show(diagnosis, Console())
    delivery.exit(passed=diagnosis.ok)


def show(diagnosis: Diagnosis, console: Console) -> None:
    """A line a finding, its fix below it, and a sum."""
    from epfuse.doctor.finding import Verdict

    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in ("verdict", "name"):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in diagnosis.findings:
        verdict = finding.verdict.value
        table.add_row(Text(verdict, COLOURS[verdict]), Text(finding.name), Text(finding.found))
        if finding.fix is not None:
            table.add_row("", "", Text(f"-> {finding.fix}", "bold"))
    console.print(table)
    counts = ", ".join(f"{diagnosis.count(verdict)} {verdict.value}" for verdict in Verdict)
    console.print(Text(counts))


def block(diagnosis: Diagnosis) -> str:
    """The same for a bug report: plain text in 80 columns."""
    file = io.StringIO()
    show(diagnosis, Console(file=file, width=REPORT_COLUMNS, color_system=None, no_color=True))
    lines = [f"epfuse doctor {diagnosis.epfuse}", *(line.rstrip() for line in file.getvalue().splitlines())]
    return "".join(f"{line}\n" for line in lines)
