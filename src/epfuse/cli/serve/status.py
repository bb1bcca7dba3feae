"""``epfuse serve status``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
from rich.live import Live

from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.cli.serve.running import exit_of, print_status, run_folder
from epfuse.report.terminal import Console

EPILOG = """\b
Examples:
  epfuse serve status six
  epfuse serve status six --watch
  epfuse serve status six --json | jq -r '.points[] | select(.state == "failed") | .why'

\b
Exit status: 0 every point is done; 1 all have ended, one has failed, was gated out or cancelled; 2 the folder
can't be used; 75 points have not ended; 130 interrupted.
"""


@click.command(epilog=EPILOG)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="RUN")
@click.option("--watch", is_flag=True, help="Show it until every point has ended.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def status(run: Path, watch: bool, as_json: bool) -> None:
    """Show where the points of the run in the folder RUN are. Changes nothing; no launcher is asked."""
    from epfuse.serving.status import read_status

    folder = run_folder(run)
    delivery = Delivery()
    found = read_status(folder)
    if watch:
        with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
            while not found.finished:
                live.update(found.table(time.time()), refresh=True)
                time.sleep(1.0)
                found = read_status(folder)
    with delivery.of(STDOUT):
        print_status(found, as_json)
    delivery.exit(passed=True) if delivery.failed else sys.exit(exit_of(found))
