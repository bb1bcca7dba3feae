"""What all parts share: the time that is left, and records that are kept as soon as there is something in them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import click
from tools.serve_on_gpu.records import FORMAT, read_records

from epfuse.cli.exits import EXIT_CHECK_FAILED, EXIT_UNFINISHED
from epfuse.errors import EpfuseError
from epfuse.report.write import write_atomic


class OutOfTime(EpfuseError):
    """The time of this part is over; what was done until then is kept."""


class TimeBudget:
    """The time of a part. Called, it raises `OutOfTime` when that is over: for `epfuse.serving.server.Server`.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._longest: dict[str, float] = {}

    def __call__(self) -> None:
        if self.left <= 0:
            raise OutOfTime("the time of this part is over")

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    @contextmanager
    def work(self, kind: str, seconds: float) -> Iterator[None]:
        """A thing that is not begun if it would not end in time; the next of its kind is taken to be as long.

        Args:
            kind: of work.
            seconds: that the first of its kind is taken to need.

        Raises:
            OutOfTime: it would not; or it did not.
        """
        expected = self._longest.get(kind, seconds)
        if expected > self.left:
            raise OutOfTime(f"{kind} takes some {expected:.0f} s, and {max(self.left, 0):.0f} s are left")
        begun = time.monotonic()
        yield
        self._longest[kind] = max(self._longest.get(kind, 0.0), time.monotonic() - begun)


@dataclass
class Outcome:
    """What a part did not do, a sentence each.

    Attributes:
        failed: what went wrong.
        left: what there was no time for; another call does it.
    """

    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @contextmanager
    def attempt(self, what: str, record: dict[str, Any], keep: Callable[[], None], rest: str = "") -> Iterator[None]:
        """One thing of a part. Its end is kept, whatever it is; only what there was no time for leaves no record.

        Args:
            what: in messages.
            record: gets "error" if it fails; with "passed" False and a "reason" it has failed, too.
            keep: writes the record.
            rest: what is left beside it if there was no time.
        """
        try:
            yield
        except OutOfTime as late:
            self.left.append(f"{what}{rest}: {late}")
            return
        except EpfuseError as error:
            record["error"] = str(error)
            self.failed.append(f"{what}: {error}")
        else:
            if record.get("passed") is False:
                self.failed.append(f"{what}: {record['reason']}")
        keep()

    def finish(self) -> NoReturn:
        """Say it and exit: 1 if something failed, 75 if something is left."""
        for line in [*self.failed, *self.left]:
            click.echo(line, err=True)
        sys.exit(EXIT_CHECK_FAILED if self.failed else EXIT_UNFINISHED if self.left else 0)


class Folder:
    """The records of a run, a file each.

    Args:
        path: made if it is not there.
        label: of this run; a record is known by part, label and number.
    """

    def __init__(self, path: Path, label: str) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.label = path, label

    def file(self, part: str, number: int, arm: str) -> Path:
        """Where a record lies."""
        return self.path / f"{self.label}-{part}-{number:02d}-{arm}.json"

    def has(self, part: str, number: int, arm: str) -> bool:
        """Whether it has been done to its end."""
        file = self.file(part, number, arm)
        return file.exists() and all(record["complete"] for record in read_records(file))

    def keep(self, part: str, number: int, arm: str, content: dict[str, Any]) -> None:
        """Write a record; a later one of the same name takes its place."""
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"part": part, "label": self.label, "number": number, "arm": arm, "written": stamp} | content
        write_atomic(self.file(part, number, arm), json.dumps({"format": FORMAT, "records": [record]}, indent=1) + "\n")


def say(words: str) -> None:
    """A line of progress."""
    click.echo(f"{datetime.now():%H:%M:%S} {words}", err=True)
