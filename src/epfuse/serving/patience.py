"""What a dispatcher puts up with: points that fail, jobs that wait for what never comes, launchers that are silent."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from epfuse.serving.contact import Clock
from epfuse.serving.launchers.launcher import JobPhase, Sighting

HOPELESS = re.compile(
    r"PartitionConfig|PartitionNodeLimit|PartitionTimeLimit|BadConstraints|DependencyNeverSatisfied|InvalidAccount"
    r"|InvalidQOS|AccountNotAllowed|QOSNotAllowed|JobHeld|held|Max\w*PerJob|MaxWallDurationPerJobLimit"
)
"""Slurm's reasons for PENDING that neither another job's end nor a node that comes back changes."""

TAKEN_AWAY = {"CANCELLED", "NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED"}
"""Slurm's words for a job that ended by no act of its own."""


@dataclass(frozen=True)
class Rules:
    """How patient a dispatcher is.

    Attributes:
        poll: seconds between two steps.
        attempts: at a point whose jobs die without an end.
        losses: how often a point may be taken by the launcher, and then not be there, or end before it began.
        identical: failures of the same kind, one after the other, after which nothing more is submitted.
        hopeless: seconds that a job may be PENDING for a reason that never ends.
        outage: seconds without any answer from a launcher after which the dispatcher leaves; the run can be resumed.
        longest_pause: seconds between two tries of a launcher that does not answer.
        ask_again: seconds after which a cancel is repeated that has shown no effect.
    """

    poll: float = 5.0
    attempts: int = 2
    losses: int = 5
    identical: int = 3
    hopeless: float = 600.0
    outage: float = 12 * 3600.0
    longest_pause: float = 300.0
    ask_again: float = 30.0


@dataclass
class Breaker:
    """Opens after failures that are the same but for their numbers, be they hexadecimal.

    Attributes:
        identical: how many of them, one after the other.
        open: why nothing more is submitted; empty while it is closed.
    """

    identical: int
    open: str = ""
    _kind: str = ""
    _count: int = 0

    def failed(self, why: str) -> bool:
        """Count a failure; whether it has opened the breaker."""
        kind = re.sub(r"\b(0x[0-9a-fA-F]+|[0-9a-f]*[0-9][0-9a-f]*)\b|[0-9]+", "N", why)
        self._count = self._count + 1 if kind == self._kind else 1
        self._kind = kind
        if self._count < self.identical or self.open:
            return False
        self.open = f"{self._count} times the same failure, so nothing more is submitted: {why}"
        return True

    def succeeded(self) -> None:
        """Failures before this are not in a row with failures after it."""
        self._kind, self._count = "", 0


@dataclass
class Queue:
    """Since when points' jobs wait for what never comes.

    Attributes:
        hopeless: seconds after which such a job is given up.
        clock: the time.
    """

    hopeless: float
    clock: Clock
    _since: dict[str, float] = field(default_factory=dict)

    def given_up(self, name: str, job: Sighting) -> str | None:
        """Why point ``name``, whose job was just seen, should be ended; None while it may go on."""
        if job.phase is not JobPhase.WAITING or not HOPELESS.search(job.why):
            self.forget(name)
            return None
        if self.clock.now() - self._since.setdefault(name, self.clock.now()) <= self.hopeless:
            return None
        return f"it was {job.word} for {self.hopeless:.0f} s because of {job.why}"

    def forget(self, name: str) -> None:
        """The point's job waits no more."""
        self._since.pop(name, None)
