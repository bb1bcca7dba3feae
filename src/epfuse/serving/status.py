"""Where a run is, for people and programs: read from its journal and its points' ends, without a lock."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Group
from rich.text import Text

from epfuse.errors import ConfigError
from epfuse.report.terminal import figures, make_table
from epfuse.serving.journal import ENDS, History, PointState, one_line, read_journal
from epfuse.serving.layout import RunFolder, make_key
from epfuse.serving.lock import Owner, read_owner

COLOURS = {
    PointState.DONE: "green",
    PointState.FAILED: "red",
    PointState.GATED_OUT: "red",
    PointState.CANCELLED: "yellow",
    PointState.UNKNOWN: "yellow",
    PointState.RUNNING: "cyan",
}
LAST_NOTES = 5


@dataclass(frozen=True)
class PointStatus:
    """A point's row.

    Attributes:
        key: of its present attempt; empty before the first.
        since: seconds since 1970.
        why: in words.
    """

    name: str
    state: PointState
    attempt: int
    key: str
    place: str
    job: str
    since: float
    why: str

    @property
    def has_ended(self) -> bool:
        return self.state in ENDS


@dataclass(frozen=True)
class RunStatus:
    """A run's table.

    Attributes:
        dispatcher: who runs it, if the lock's file names one; whether it lives, only its machine knows.
        notes: the journal's last ones.
        torn: bytes of a last line that is not finished.
    """

    run: str
    label: str
    launcher: str
    dispatcher: Owner | None
    points: tuple[PointStatus, ...]
    notes: tuple[str, ...]
    torn: int

    @property
    def finished(self) -> bool:
        return all(point.has_ended for point in self.points)

    @property
    def all_done(self) -> bool:
        return all(point.state is PointState.DONE for point in self.points)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"finished": self.finished, "all_done": self.all_done}

    def table(self, now: float) -> Group:
        """For a terminal; reasons stand below the table, for their lines are long and its columns narrow.

        Args:
            now: seconds since 1970.
        """
        places = {point.place for point in self.points if point.place}
        title = self.run + (f" ({self.label})" if self.label else "")
        if len(places) == 1:
            title += f" at {next(iter(places))}"
        last = ["place"] if len(places) > 1 else []
        table = make_table("point", "state", figures("try"), "job", figures("for"), *last, title=title)
        for point in self.points:
            state = Text(point.state, COLOURS.get(point.state, ""))
            attempt = str(point.attempt) if point.attempt else ""
            place = [point.place] if len(places) > 1 else []
            table.add_row(point.name, state, attempt, point.job, _duration(now - point.since), *place)
        reasons = [Text(f"{point.name}: {point.why}") for point in self.points if point.why]
        return Group(table, *reasons)


def read_status(folder: RunFolder) -> RunStatus:
    """Where a run is now.

    Raises:
        ConfigError: it is no run, or its files are damaged.
    """
    run = folder.read_run()
    return status_of(folder, run.label, run.launcher, read_journal(folder.journal))


def status_of(folder: RunFolder, label: str, launcher: str, history: History) -> RunStatus:
    """As `read_status`, of a journal that is open."""
    points = []
    for name, change in history.points.items():
        state, why = change.state, change.why
        if state not in ENDS:
            try:
                done = folder.read_done(name)
            except ConfigError as error:
                done, why = None, one_line(str(error))
            if done is not None:  # it ended, and no dispatcher has looked since
                state, why = PointState(done.state), one_line(done.reason)
        key = make_key(history.run, name, change.attempt) if change.attempt else ""
        points.append(PointStatus(name, state, change.attempt, key, change.place, change.job, change.at, why))
    notes = tuple(
        f"{datetime.fromtimestamp(note.at, UTC):%Y-%m-%d %H:%M:%S} UTC: {note.text}"
        for note in history.notes[-LAST_NOTES:]
    )
    owner = read_owner(folder.lock)
    return RunStatus(history.run, label, launcher, owner, tuple(points), notes, history.torn)


def _duration(seconds: float) -> str:
    whole = max(0, int(seconds))
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
