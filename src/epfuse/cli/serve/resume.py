"""``epfuse serve resume``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from epfuse.cli.serve.running import EXITS, Patience, dispatch, dispatches, run_folder

if TYPE_CHECKING:
    from epfuse.serving.dispatch import Dispatcher

EPILOG = f"""\b
Examples:
  epfuse serve resume six
  epfuse serve resume six --again

{EXITS}"""


@click.command(epilog=EPILOG)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="RUN")
@click.option("--again", is_flag=True, help="Plan points again that failed, were gated out or cancelled.")
@click.option(
    "--take-over", is_flag=True, help="From a dispatcher on another machine, of which you know that it is dead."
)
@dispatches
def resume(run: Path, again: bool, take_over: bool, patience: Patience) -> None:
    """Go on with the run in the folder RUN, from any machine that sees it.

    Jobs that run or wait are found again, ends that were written meanwhile are read, and what was never submitted is.
    """

    def prepare(dispatcher: Dispatcher) -> None:
        if again:
            dispatcher.plan_again()

    dispatch(run_folder(run), patience, prepare, take_over)
