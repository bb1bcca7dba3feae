"""The dispatcher's memory: one append-only file a run, a line an event, each with a checksum, on disk before the deed.

A line is ``CRC32 JSON``; the JSON's ``n`` counts from 0. Line 0 names the run. What was written before the dispatcher
was killed is whole, but for a last line that was on its way: it was not on disk when it was to be acted on, so nothing
was done because of it, and it is cut.
"""

from __future__ import annotations

import enum
import os
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal, TypedDict, Unpack

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from epfuse.errors import ConfigError
from epfuse.input_file import read_file
from epfuse.profiling.text import printable
from epfuse.report.write import write_atomic
from epfuse.serving.lock import RunLock
from epfuse.serving.point import Frozen, Name

LARGEST_JOURNAL = 256 << 20
LONGEST_WHY = 1000


class PointState(enum.StrEnum):
    """Where a point is."""

    PLANNED = "planned"
    """Nothing of it is anywhere."""
    SUBMITTING = "submitting"
    """A launcher is about to be asked; a dispatcher that dies now leaves a doubt."""
    UNKNOWN = "unknown"
    """It may be submitted or not, or running or gone: the launcher did not say, or can't be reached."""
    QUEUED = "queued"
    """The launcher has it, and it does not run yet."""
    STARTING = "starting"
    """Its job runs; the server is not ready."""
    WARMING = "warming"
    """Warm-up and gate."""
    GATED_OUT = "gated_out"
    """Its answers are wrong: it has no speed."""
    RUNNING = "running"
    """Under load, being measured."""
    DONE = "done"
    """Measured."""
    FAILED = "failed"
    """It ended without a measurement."""
    CANCELLED = "cancelled"
    """Somebody asked for its end."""


ENDS = frozenset({PointState.DONE, PointState.GATED_OUT, PointState.FAILED, PointState.CANCELLED})
AT_WORK = frozenset({PointState.STARTING, PointState.WARMING, PointState.RUNNING})
SENT = frozenset({PointState.SUBMITTING, PointState.UNKNOWN, PointState.QUEUED}) | AT_WORK
"""A launcher has it, or may have it."""

NEXT: Mapping[PointState, frozenset[PointState]] = {
    # a job that no look showed may come late
    PointState.PLANNED: ENDS | AT_WORK | {PointState.SUBMITTING, PointState.QUEUED},
    PointState.SUBMITTING: ENDS | AT_WORK | {PointState.UNKNOWN, PointState.QUEUED},
    PointState.UNKNOWN: ENDS | AT_WORK | {PointState.PLANNED, PointState.QUEUED},
    PointState.QUEUED: ENDS | AT_WORK | {PointState.UNKNOWN},
    # an A/B starts several servers one after the other
    PointState.STARTING: ENDS | AT_WORK | {PointState.UNKNOWN},
    PointState.WARMING: ENDS | AT_WORK | {PointState.UNKNOWN},
    PointState.RUNNING: ENDS | AT_WORK | {PointState.UNKNOWN},
    # only `resume --again` plans what has ended; a job that ended well while it was being given up has ended well
    PointState.DONE: frozenset(),
    PointState.GATED_OUT: frozenset({PointState.PLANNED}),
    PointState.FAILED: frozenset({PointState.PLANNED, PointState.DONE, PointState.GATED_OUT}),
    PointState.CANCELLED: frozenset({PointState.PLANNED, PointState.DONE, PointState.GATED_OUT, PointState.FAILED}),
}
"""The legal transitions; a state may also be written again, with other words."""


class Begin(Frozen):
    """Line 0."""

    kind: Literal["begin"] = "begin"
    version: Literal[1] = 1
    n: Literal[0] = 0
    at: FiniteFloat
    run: Name
    points: tuple[Name, ...]


class Change(Frozen):
    """A point's state.

    Attributes:
        at: seconds since 1970.
        attempt: the point's, from 1; 0 before the first.
        place: the launcher's place that has the attempt: a host, ``slurm``.
        job: the launcher's number.
        why: in words.
    """

    kind: Literal["change"] = "change"
    n: int
    at: FiniteFloat
    point: Name
    state: PointState
    attempt: Annotated[int, Field(ge=0)] = 0
    place: str = ""
    job: str = ""
    why: str = ""


class ChangeDetails(TypedDict, total=False):
    """What a change may say besides, as `Change` has it."""

    attempt: int
    place: str
    job: str


class Note(Frozen):
    """Something about the run that is no point's state."""

    kind: Literal["note"] = "note"
    n: int
    at: FiniteFloat
    text: str


Entry = Annotated[Begin | Change | Note, Field(discriminator="kind")]
_ENTRY: TypeAdapter[Begin | Change | Note] = TypeAdapter(Entry)


@dataclass
class History:
    """What a journal says.

    Attributes:
        run: the run's name.
        points: point -> its last change, in the run's order.
        accepted: point -> how often a launcher has taken its present attempt.
        notes: the run's.
        lines: how many there are.
        size: bytes of whole lines.
        torn: bytes of a last line that was never finished.
    """

    run: str
    points: dict[str, Change]
    accepted: dict[str, int] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    lines: int = 1
    size: int = 0
    torn: int = 0

    def take(self, entry: Begin | Change | Note) -> None:
        """Add an entry.

        Raises:
            ConfigError: it can't follow what is there.
        """
        if isinstance(entry, Begin):
            raise ConfigError("a journal begins once")
        if isinstance(entry, Note):
            self.notes.append(entry)
        else:
            before = self.points.get(entry.point)
            if before is None:
                raise ConfigError(f"{entry.point!r} is no point of run {self.run}")
            if entry.state is not before.state and entry.state not in NEXT[before.state]:
                raise ConfigError(f"point {entry.point} can't go from {before.state} to {entry.state}")
            if entry.attempt < before.attempt:
                raise ConfigError(f"point {entry.point} can't go back from attempt {before.attempt} to {entry.attempt}")
            if entry.attempt > before.attempt:
                self.accepted[entry.point] = 0
            if before.state is PointState.SUBMITTING and entry.state is PointState.QUEUED:
                self.accepted[entry.point] = self.accepted.get(entry.point, 0) + 1
            self.points[entry.point] = entry
        self.lines += 1


def read_journal(path: Path) -> History:
    """What a journal says; changes nothing, so also while a dispatcher writes.

    Raises:
        ConfigError: it can't be read, has no whole line, or a line that is not the last one has another checksum, does
            not follow the one before or is none; the message names the line.
    """
    data = read_file(path, "journal", LARGEST_JOURNAL)
    lines = data.split(b"\n")
    rest = lines.pop()  # what stands after the last line's end
    entries: list[Begin | Change | Note] = []
    size = 0
    for number, line in enumerate(lines):
        try:
            entries.append(_parse(line, number))
        except ConfigError as error:
            # the end of a line may reach the disk before its beginning
            if number == len(lines) - 1 and not rest and number > 0 and not _checksum_fits(line):
                break
            raise ConfigError(f"journal {path}, line {number + 1}: {error}") from None
        size += len(line) + 1
    if not entries:
        raise ConfigError(f"journal {path} has no whole line; its run has not begun: remove it")
    first = entries[0]
    assert isinstance(first, Begin)  # `_parse` of line 0
    planned = {name: Change(n=0, at=first.at, point=name, state=PointState.PLANNED) for name in first.points}
    history = History(first.run, planned, size=size, torn=len(data) - size)
    for number, entry in enumerate(entries[1:], 2):
        try:
            history.take(entry)
        except ConfigError as error:
            raise ConfigError(f"journal {path}, line {number}: {error}") from None
    return history


class Journal:
    """A run's journal, open for writing by the one dispatcher that holds the run's lock.

    Attributes:
        path: its file.
        history: what it says.
    """

    def __init__(self, path: Path, lock: RunLock, clock: Callable[[], float] = time.time) -> None:
        """Open a journal, and cut a last line that was never finished.

        Raises:
            ConfigError: as `read_journal`.
            OSError: it can't be written.
        """
        self.path = path
        self.history: History = read_journal(path)
        self._clock = clock
        self._lock = lock
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        if torn := self.history.torn:
            os.ftruncate(self._file, self.history.size)
            os.fsync(self._file)
            self.note(f"{torn} bytes of a line that was never finished were cut from the journal's end")

    @staticmethod
    def begin(path: Path, run: str, points: tuple[str, ...], at: float) -> None:
        """Make a run's journal, whole and on disk, its name too; there is none.

        Raises:
            OSError: it can't be written.
        """
        write_atomic(path, _line(Begin(at=at, run=run, points=points)))

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def change(self, point: str, state: PointState, why: str = "", **given: Unpack[ChangeDetails]) -> None:
        """Write a point's new state; on disk when this returns. What is not given stays as it was.

        Raises:
            ConfigError: the transition is not legal, or another dispatcher has taken the run over.
            OSError: it can't be written; the state is as it was.
        """
        kept = {**self.history.points[point].model_dump(include={"attempt", "place", "job"}), **given}
        lines = self.history.lines
        self._append(Change(n=lines, at=self._clock(), point=point, state=state, why=one_line(why), **kept))

    def note(self, text: str) -> None:
        """Write something about the run."""
        self._append(Note(n=self.history.lines, at=self._clock(), text=one_line(text)))

    def _append(self, entry: Change | Note) -> None:
        self._lock.check()
        if isinstance(entry, Change):
            before = self.history.points[entry.point].state
            if entry.state is not before and entry.state not in NEXT[before]:
                raise ConfigError(f"point {entry.point} can't go from {before} to {entry.state}")
        line = _line(entry)
        try:
            _write(self._file, line)
        except OSError:  # a full disk: no half line may stand before the next one
            os.ftruncate(self._file, self.history.size)
            raise
        self.history.size += len(line)
        self.history.take(entry)


def _line(entry: Begin | Change | Note) -> bytes:
    text = entry.model_dump_json().encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _write(file: int, line: bytes) -> None:
    left = memoryview(line)
    while left:
        left = left[os.write(file, left) :]
    os.fsync(file)


def _checksum_fits(line: bytes) -> bool:
    head, _, text = line.partition(b" ")
    return head == b"%08x" % zlib.crc32(text)


def _parse(line: bytes, number: int) -> Begin | Change | Note:
    if not _checksum_fits(line):
        raise ConfigError("its checksum does not fit: the file was damaged or edited")
    try:
        entry = _ENTRY.validate_json(line.partition(b" ")[2])
    except ValidationError as error:
        raise ConfigError(f"it is no entry: {error.errors(include_url=False)[0]['msg']}") from None
    if entry.n != number or isinstance(entry, Begin) != (number == 0):
        raise ConfigError(f"it is entry {entry.n} ({entry.kind}): a line is missing, or stands twice")
    return entry


def one_line(text: str) -> str:
    """A text from anywhere as one line of characters that can do nothing but be seen; cut where it is long."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= LONGEST_WHY else text[: LONGEST_WHY - 3] + "..."
