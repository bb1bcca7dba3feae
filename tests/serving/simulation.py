"""A batch system in simulated time that fails as real ones do, and dispatchers that are killed at any point."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from epfuse.serving.claim import Claim, Revoked
from epfuse.serving.done import Done, End
from epfuse.serving.launchers.launcher import (
    Accepted,
    CleanLook,
    JobPhase,
    Order,
    Rejected,
    Sighting,
    Unreachable,
    Unsure,
)
from epfuse.serving.layout import PointFolder


class Killed(BaseException):
    """The dispatcher's end, in the middle of whatever it does."""


@dataclass
class Job:
    key: str
    number: int
    point: Path
    due: float
    phase: JobPhase = JobPhase.WAITING
    word: str = "PENDING"
    why: str = ""
    claim: Claim | None = None
    works: bool = False


@dataclass
class World:
    """Time, a batch system and its faults.

    Attributes:
        seed: of everything that happens by chance.
        late: the longest time until an order that got no answer arrives after all.
        copies: share of accepted orders that start two jobs in the same second, as without a singleton.
        ghosts: share of jobs that the batch system calls dead while their processes run on.
        starts, ends: of points; ``began`` of attempts, by their keys.
        overlaps: points at which a job began while another one held the claim.
    """

    seed: int
    points: Path
    late: float = 10.0
    kills: float = 0.0
    refusals: float = 0.0
    outages: float = 0.0
    losses: float = 0.0
    deaths: float = 0.0
    copies: float = 0.0
    ghosts: float = 0.0
    time: float = 1000.0
    jobs: list[Job] = field(default_factory=list)
    arriving: list[tuple[float, Order]] = field(default_factory=list)
    starts: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    began: Counter[str] = field(default_factory=Counter)
    overlaps: list[str] = field(default_factory=list)
    orders: Counter[str] = field(default_factory=Counter)
    down_until: float = 0.0
    next_number: int = 1
    pending_why: str = "Priority"
    stuck: bool = False
    name: str = "slurm"

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    # the clock

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.maybe_killed()
        end = self.time + seconds
        while self.time < end:
            self.time = min(end, self.time + 1.0)
            self.tick()

    def maybe_killed(self) -> None:
        if self.chance.random() < self.kills:
            raise Killed

    def tick(self) -> None:
        if self.time >= self.down_until:
            for due, order in [late for late in self.arriving if late[0] <= self.time]:
                self.arriving.remove((due, order))
                self.accept(order)
        if self.chance.random() < self.outages / 100:
            self.down_until = self.time + self.chance.uniform(1, 120)
        for job in self.jobs:
            if (job.phase is not JobPhase.ENDED or job.works) and not self.stuck and self.time >= job.due:
                self.advance(job)

    def advance(self, job: Job) -> None:
        if job.phase is JobPhase.WAITING:
            running = [other for other in self.jobs if other.key == job.key and other.phase is JobPhase.RUNNING]
            if running and not self.copies:
                return  # singleton
            job.phase, job.word, job.due = JobPhase.RUNNING, "RUNNING", self.time + self.chance.uniform(1, 60)
            self.begin(job)
        elif job.phase is JobPhase.ENDED:
            self.end(job)  # a ghost's
        elif self.chance.random() < self.deaths:
            job.phase, job.word, job.works = JobPhase.ENDED, "NODE_FAIL", False
        elif self.chance.random() < self.ghosts:
            job.phase, job.word, job.due = JobPhase.ENDED, "NODE_FAIL", self.time + self.chance.uniform(0, 200)
        else:
            job.phase, job.word = JobPhase.ENDED, "COMPLETED"
            self.end(job)

    def begin(self, job: Job) -> None:
        """What the job does first: two copies of it both see that there is no end yet."""
        if not PointFolder(job.point).done.exists():
            job.claim = Claim.take(job.point, job.key)
        if job.claim is None:
            job.phase, job.word = JobPhase.ENDED, "COMPLETED"
            return
        for other in self.jobs:
            if other.works and other.point == job.point and other.claim is not None and other.claim.held:
                self.overlaps.append(job.point.name)
        job.works = True
        self.starts[job.point.name] += 1
        self.began[job.key] += 1

    def end(self, job: Job, state: End = End.DONE, reason: str = "") -> None:
        assert job.claim is not None
        job.works = False
        done = Done(name=job.point.name, key=job.key, state=state, reason=reason, started=1.0, ended=2.0)
        with contextlib.suppress(Revoked):
            job.claim.publish(done.model_dump_json(by_alias=True).encode(), PointFolder(job.point).done)
            self.ends[job.point.name] += 1

    def accept(self, order: Order) -> Job:
        job = Job(order.key, self.next_number, Path(order.argv[-3]), self.time + self.chance.uniform(0, 30))
        job.why = self.pending_why
        self.next_number += 1
        self.jobs.append(job)
        if self.chance.random() < self.copies:
            self.jobs.append(replace(job, number=self.next_number))
            self.next_number += 1
        return job

    # the launcher

    def patience(self) -> float:
        return 16.0

    @property
    def places(self) -> Mapping[str, int | None]:
        return {"slurm": None}

    def submit(self, order: Order, place: str) -> Accepted | Rejected | Unsure:
        self.maybe_killed()
        self.orders[order.key] += 1
        if self.time < self.down_until or self.chance.random() < self.refusals:
            if self.chance.random() < 0.5:
                self.arriving.append((self.time + self.chance.uniform(0, self.late), order))
            self.time += 9.0
            return Unsure("Socket timed out on send/recv operation")
        job = self.accept(order)
        if self.chance.random() < self.losses:
            self.jobs.remove(job)
            self.next_number -= 1
        self.maybe_killed()
        return Accepted(str(job.number))

    def look(self, place: str, keys: Sequence[str]) -> CleanLook | Unreachable:
        self.maybe_killed()
        if self.time < self.down_until:
            return Unreachable("Unable to contact slurm controller (connect failure)")
        jobs = (job for job in self.jobs if job.key in keys)
        return CleanLook(tuple(Sighting(job.key, str(job.number), job.phase, job.word, job.why) for job in jobs))

    def probe(self, place: str) -> str | None:
        return "Slurmctld is DOWN" if self.time < self.down_until else None

    def cancel(self, place: str, key: str) -> str | None:
        if self.time < self.down_until:
            return "Unable to contact slurm controller (connect failure)"
        for job in self.jobs:
            if job.key == key and job.phase is not JobPhase.ENDED:
                job.phase, job.word, job.works = JobPhase.ENDED, "CANCELLED", False
        return None
