"""``epfuse serve report``."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.cli.serve.reading import read_run
from epfuse.report.write import write_atomic

EPILOG = """\b
Examples:
  epfuse serve report runs/first                       # writes runs/first/report.html
  epfuse serve report runs/first --json | jq '.points[] | [.name, .state]'

\b
Exit status: 0 every point is done, 1 one is not, or a result can't be read; 2 no run, or a result that could not be
written; 130 interrupted.
"""


@click.command(epilog=EPILOG)
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="Where to write.  [default: RUN/report.html]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON; times in seconds.")
def report(folder: Path, html: Path | None, as_json: bool) -> None:
    """Write a run as one self-contained page: throughput, latencies, comparisons, gates, environment.

    It works at any time: points that have not ended are shown as they are.
    """
    from epfuse.serving.page import serve_page
    from epfuse.serving.report_json import report_json

    page = folder / "report.html" if html is None else html
    delivery = Delivery({"--html": page if folder.is_dir() else None})
    record = read_run(folder)
    with delivery.of("--html"):
        write_atomic(page, serve_page(record, time.time()))
        click.echo(f"written: {page}", err=True)
    with delivery.of(STDOUT):
        if as_json:
            click.echo(json.dumps(report_json(record), indent=2, allow_nan=False))
        else:
            if record.run.label:
                click.echo(record.run.label)
            for point in record.points:
                click.echo(f"{point.name}: {point.state}" + (f": {point.reason}" if point.reason else ""))
            for name, verdict in record.verdicts.items():
                click.echo(f"{name}: {verdict.sentence}")
    delivery.exit(passed=record.ok)
