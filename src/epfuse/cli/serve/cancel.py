"""``epfuse serve cancel``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from epfuse.cli.delivery import Delivery
from epfuse.cli.serve.running import EXITS, Patience, dispatches, end, opened, run_folder, shown
from epfuse.errors import ConfigError

EPILOG = f"""\b
Examples:
  epfuse serve cancel six
  epfuse serve cancel six minimaxm3_8k1k-c256-tp8-ep8

{EXITS}"""


@click.command(epilog=EPILOG)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="RUN")
@click.argument("points", nargs=-1, metavar="[POINT]...")
@click.option(
    "--take-over", is_flag=True, help="From a dispatcher on another machine, of which you know that it is dead."
)
@dispatches
def cancel(run: Path, points: tuple[str, ...], take_over: bool, patience: Patience) -> None:
    """End points of the run in the folder RUN, all of them if none is named, and wait until they have ended.

    A dispatcher that runs does it; without one this command does, and asks until the launcher shows that the jobs are
    gone. A point that ends well in the meantime is done.
    """
    from epfuse.serving.lock import RunLocked
    from epfuse.serving.status import read_status

    folder = run_folder(run)
    delivery = Delivery()
    known = folder.read_run().points
    if unknown := [name for name in points if name not in known]:
        raise ConfigError(f"POINT is {unknown[0]!r}; the run has {', '.join(known)}")
    asked = points or known
    for name in asked:
        folder.point(name).cancel.touch()

    def left() -> list[str]:
        return [point.name for point in read_status(folder).points if point.name in asked and not point.has_ended]

    unfinished = ""
    try:
        with opened(folder, patience, take_over) as dispatcher, shown(dispatcher) as show:
            dispatcher.submits = False
            unfinished = dispatcher.end_points(asked, show)
    except RunLocked as held:
        if take_over:
            raise
        click.echo(f"{held}; it ends the points", err=True)
        until = time.monotonic() + patience.outage
        while left() and time.monotonic() < until:
            time.sleep(patience.poll or 1.0)
        if remaining := left():
            unfinished = f"{', '.join(remaining)} have not ended"
    end(delivery, folder, patience.as_json, unfinished)
