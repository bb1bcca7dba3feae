"""What ``run``, ``resume`` and ``cancel`` have in common: a dispatcher, its table, and how it ends.

| exit code | meaning |
| --- | --- |
| 0 | every point is done |
| 1 | every point has ended, and one has failed, was gated out or cancelled |
| 2 | wrong usage, another dispatcher has the run, or its folder is damaged or can't be written |
| 75 | points have not ended, nothing is lost: a launcher does not answer, or failures stopped the run; resume it |
| 130 | interrupted; jobs go on, and ``epfuse serve resume`` finds them |
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.live import Live

from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.cli.exits import EXIT_CHECK_FAILED, EXIT_UNFINISHED
from epfuse.cli.names import Command, adds
from epfuse.errors import ConfigError
from epfuse.report.terminal import Console, stdout

if TYPE_CHECKING:
    from epfuse.serving.dispatch import Dispatcher
    from epfuse.serving.launchers.launcher import Launcher
    from epfuse.serving.layout import RunFolder
    from epfuse.serving.point import Run
    from epfuse.serving.status import RunStatus

EXITS = """\b
Exit status: 0 every point is done; 1 all have ended, one has failed, was gated out or cancelled; 2 wrong usage,
or the run's folder can't be used; 75 points are left and nothing is lost: resume the run; 130 interrupted.
"""

OPTIONS = (
    click.option(
        "--poll",
        type=click.FloatRange(0.05, 3600),
        metavar="SECONDS",
        help="Between two looks.  [default: 1 for local, else 5]",
    ),
    click.option(
        "--attempts",
        type=click.IntRange(1, 100),
        default=2,
        show_default=True,
        help="At a point whose jobs die without a result.",
    ),
    click.option(
        "--outage",
        type=click.FloatRange(1, 30 * 86400),
        default=43200.0,
        show_default=True,
        metavar="SECONDS",
        help="Without an answer of the launcher, after which the command leaves.",
    ),
    click.option(
        "--hopeless",
        type=click.FloatRange(1, 30 * 86400),
        default=600.0,
        show_default=True,
        metavar="SECONDS",
        help="PENDING for a reason that never ends, after which a job is given up.",
    ),
    click.option(
        "--identical",
        type=click.IntRange(1, 1000),
        default=3,
        show_default=True,
        help="Failures of one kind in a row, after which nothing more is submitted.",
    ),
    click.option(
        "--python",
        default=sys.executable,
        metavar="FILE",
        help="The interpreter of the jobs, on their nodes.  [default: this one]",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the end as JSON."),
)


@dataclass(frozen=True)
class Patience:
    """The options of how a run is dispatched."""

    poll: float | None
    attempts: int
    outage: float
    hopeless: float
    identical: int
    python: str
    as_json: bool


def dispatches(command: Command) -> Command:
    """Add the options of `Patience`; the command gets ``patience``."""

    @functools.wraps(command)
    def with_patience(**given: Any) -> None:
        command(patience=Patience(**{name: given.pop(name) for name in Patience.__annotations__}), **given)

    return adds(OPTIONS)(with_patience)


def run_folder(path: Path) -> RunFolder:
    """A run's folder that somebody named.

    Raises:
        ConfigError: it is none.
    """
    from epfuse.serving.layout import RunFolder

    folder = RunFolder(path.absolute())
    if not folder.run.is_file():
        raise ConfigError(f"RUN is {str(path)!r}, which has no run.json; name the folder of a run")
    return folder


def launcher_of(run: Run, python: str) -> Launcher:
    """What starts a run's jobs.

    Raises:
        ConfigError: it needs what the run does not have.
    """
    if run.launcher == "local":
        from epfuse.serving.launchers.local import LocalLauncher

        return LocalLauncher()
    if run.launcher == "ssh":
        from epfuse.serving.launchers.ssh import SshLauncher

        return SshLauncher(run.hosts, python)
    from epfuse.serving.launchers.slurm import SlurmLauncher

    return SlurmLauncher(run.slurm)


@contextmanager
def opened(folder: RunFolder, patience: Patience, take_over: bool = False) -> Iterator[Dispatcher]:
    """A run's dispatcher, with its lock and its journal.

    Raises:
        ConfigError: another dispatcher has it, or the journal is damaged.
        OSError: the folder can't be written.
    """
    from epfuse.serving.dispatch import Dispatcher
    from epfuse.serving.journal import Journal
    from epfuse.serving.lock import RunLock
    from epfuse.serving.patience import Rules

    run = folder.read_run()
    rules = Rules(
        poll=patience.poll or (1.0 if run.launcher == "local" else 5.0),
        attempts=patience.attempts,
        outage=patience.outage,
        hopeless=patience.hopeless,
        identical=patience.identical,
    )
    launcher = launcher_of(run, patience.python)
    with RunLock(folder.lock, take_over) as lock:
        if not folder.journal.exists():  # killed between the two files: nothing was submitted
            Journal.begin(folder.journal, run.name, run.points, run.created)
        with Journal(folder.journal, lock) as journal:
            if lock.stale is not None:
                journal.note(f"the dispatcher before, {lock.stale}, did not end by itself")
            job = (patience.python, "-m", "epfuse.serving.job")
            yield Dispatcher(folder, run, journal, launcher, job, rules)


@contextmanager
def shown(dispatcher: Dispatcher) -> Iterator[Callable[[], None]]:
    """The run on stderr while it goes on: a table on a terminal, else a line for each change.

    Yields:
        What is to be called after each step.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        dispatcher.say = lambda line: click.echo(line, err=True)
        yield lambda: None
        return
    from epfuse.serving.status import status_of

    with Live(console=console, auto_refresh=False, transient=True) as live:

        def show() -> None:
            run = dispatcher.run
            status = status_of(dispatcher.folder, run.label, run.launcher, dispatcher.journal.history)
            live.update(status.table(time.time()), refresh=True)

        yield show


def dispatch(folder: RunFolder, patience: Patience, prepare: Callable[[Dispatcher], None], take_over: bool) -> None:
    """Run what is left of a run, show its end, and exit as the table above says."""
    delivery = Delivery()
    try:
        with opened(folder, patience, take_over) as dispatcher:
            prepare(dispatcher)
            with shown(dispatcher) as show:
                dispatcher.dispatch(show)
            unfinished = dispatcher.unfinished
    except KeyboardInterrupt:
        click.echo(f"epfuse: jobs go on; to go on here: epfuse serve resume {folder.path}", err=True)
        raise
    end(delivery, folder, patience.as_json, unfinished)


def end(delivery: Delivery, folder: RunFolder, as_json: bool, unfinished: str) -> None:
    """Print a run's table and exit; ``unfinished`` says why points are left."""
    from epfuse.serving.status import read_status

    status = read_status(folder)
    with delivery.of(STDOUT):
        print_status(status, as_json)
    if unfinished:
        click.echo(f"epfuse: {unfinished}; to go on: epfuse serve resume {folder.path}", err=True)
    delivery.exit(passed=True) if delivery.failed else sys.exit(exit_of(status))


def exit_of(status: RunStatus) -> int:
    """The exit code that a run's state asks for."""
    return 0 if status.all_done else EXIT_CHECK_FAILED if status.finished else EXIT_UNFINISHED


def print_status(status: RunStatus, as_json: bool) -> None:
    """A run's table, or its JSON, on stdout."""
    if as_json:
        click.echo(json.dumps(status.record(), indent=2))
        return
    console = stdout(200)
    console.print(status.table(time.time()))
    for note in status.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
