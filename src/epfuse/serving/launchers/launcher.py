"""What the dispatcher asks of a place where jobs run, and the answers, of which "I can't tell" is always one.

A launcher keeps nothing: all that it must know again after a kill is in the journal. It never repeats a submission by
itself, for only who has looked twice may submit again.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Order:
    """One attempt at one point, to be started somewhere.

    Attributes:
        key: names the attempt everywhere: letters, digits, ``.``, ``_`` and ``-``.
        argv: the job's command, without a shell.
        folder: for the job's output and the batch script; exists.
        node: the only one that will do; None: any.
        seconds: after which the job ends itself; None: never.
    """

    key: str
    argv: tuple[str, ...]
    folder: Path
    node: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Accepted:
    """The job is there.

    Attributes:
        job: the launcher's own number for it. For people: numbers are given twice, keys are not.
    """

    job: str


@dataclass(frozen=True)
class Rejected:
    """The job is not there and never will be: the same order is refused each time."""

    why: str


@dataclass(frozen=True)
class Unsure:
    """The job may be there, or may come to be there later."""

    why: str


class JobPhase(enum.Enum):
    """What a launcher knows of a job."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True)
class Sighting:
    """A job that a launcher showed.

    Attributes:
        key: the attempt.
        job: the launcher's number.
        phase: in the dispatcher's words.
        word: in the launcher's: "PENDING".
        why: its reason, if it gives one: "Resources".
    """

    key: str
    job: str
    phase: JobPhase
    word: str
    why: str = ""


@dataclass(frozen=True)
class CleanLook:
    """A clean look: what is not in it was not there at that time."""

    jobs: tuple[Sighting, ...]


@dataclass(frozen=True)
class Unreachable:
    """No look: nothing follows from it."""

    why: str


class Launcher(Protocol):
    """One kind of place. Every call returns within a minute or two, whatever the other side does."""

    @property
    def name(self) -> str:
        """As `epfuse.serving.point.Run.launcher` has it."""

    @property
    def places(self) -> Mapping[str, int | None]:
        """Name of a place -> how many jobs may be there at a time; None has no limit."""

    def patience(self) -> float:
        """Seconds that must lie between two clean looks before a job that neither showed counts as absent."""

    def submit(self, order: Order, place: str) -> Accepted | Rejected | Unsure:
        """Start a job, once; never tries again by itself."""

    def look(self, place: str, keys: Sequence[str]) -> CleanLook | Unreachable:
        """All jobs of these attempts, ended ones as long as they are remembered."""

    def probe(self, place: str) -> str | None:
        """Cheap: why a submission would fail now, or None."""

    def cancel(self, place: str, key: str) -> str | None:
        """Ask for the end of an attempt's jobs; None, or why it could not be asked. That they ended, a look shows."""
