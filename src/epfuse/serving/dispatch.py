"""The dispatcher: one loop that brings journal, launcher and the points' folders together until every point has ended.

The folders are the truth about a job (its claim, its phase, its end), the launcher about whether there is one, and the
journal remembers what was asked of the launcher. Each step can be the last one before a kill: the next dispatcher
starts from the same three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Unpack

from epfuse.errors import ConfigError
from epfuse.serving.claim import holder_of, revoke
from epfuse.serving.contact import Clock, Contacts, WallClock, cancelling, submitting
from epfuse.serving.done import End
from epfuse.serving.journal import AT_WORK, ENDS, SENT, Change, ChangeDetails, Journal, PointState, one_line
from epfuse.serving.launchers.launcher import JobPhase, Launcher, Order, Rejected, Sighting, Unreachable, Unsure
from epfuse.serving.layout import RunFolder, make_key
from epfuse.serving.patience import TAKEN_AWAY, Breaker, Queue, Rules
from epfuse.serving.point import PointJob, Run
from epfuse.serving.signs import last_words, phase_of


@dataclass
class Dispatcher:
    """Runs what a journal has left to run.

    Attributes:
        folder: of the run.
        run: what was asked.
        journal: open, with the run's lock held.
        launcher: where jobs go.
        job: the command that runs a point, there; the point's folder and ``--key KEY`` follow.
        rules: its patience.
        clock: its time.
        say: takes a line for people.
        submits: False ends what runs, or was asked to end, and starts nothing.
    """

    folder: RunFolder
    run: Run
    journal: Journal
    launcher: Launcher
    job: tuple[str, ...]
    rules: Rules = field(default_factory=Rules)
    clock: Clock = field(default_factory=WallClock)
    say: Callable[[str], None] = lambda line: None
    submits: bool = True
    _absent: dict[str, float] = field(default_factory=dict)
    _doomed: dict[str, str] = field(default_factory=dict)
    _asked: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._contacts = Contacts(self.rules.poll, self.rules.longest_pause, self.clock, self._note)
        self._queue = Queue(self.rules.hopeless, self.clock)
        self._breaker = Breaker(self.rules.identical)

    def dispatch(self, seen: Callable[[], None] = lambda: None) -> None:
        """Go on until every point has ended, or nothing more can be done now (`unfinished` says why).

        Args:
            seen: called after each step, e.g. to show a table.

        Raises:
            ConfigError: another dispatcher took over, or the folder is damaged.
            OSError: the folder can't be written.
        """
        while True:
            self.step()
            seen()
            if self.finished or self._contacts.silent_for(self.rules.outage) is not None:
                return
            self.clock.sleep(self.rules.poll)

    def end_points(self, names: Sequence[str], seen: Callable[[], None] = lambda: None) -> str:
        """Wait until these points have ended, which somebody asked for (`PointFolder.cancel`).

        Returns:
            Why some have not; empty if they have.
        """
        points = self.journal.history.points
        while True:
            self.step()
            seen()
            left = [name for name in names if points[name].state not in ENDS]
            silent = self._contacts.silent_for(self.rules.outage)
            if not left or silent is not None:
                return f"{', '.join(left)} have not ended: {silent}" if left else ""
            self.clock.sleep(self.rules.poll)

    def plan_again(self) -> None:
        """Plan what has ended without a measurement; what there was of it stays in the folders of its attempts."""
        for name, change in list(self.journal.history.points.items()):
            folder = self.folder.point(name)
            if change.state not in ENDS or self._done_well(name):
                continue
            if (holder := self._holder(name)) is not None:
                revoke(folder.path, holder)
            if folder.done.exists():
                old = folder.attempt(make_key(self.run.name, name, max(1, change.attempt))).path
                old.mkdir(parents=True, exist_ok=True)
                folder.done.rename(old / folder.done.name)
            folder.cancel.unlink(missing_ok=True)
            self._change(name, PointState.PLANNED, "again, as asked", attempt=change.attempt + 1, job="")

    def _done_well(self, name: str) -> bool:
        try:
            done = self.folder.read_done(name)
        except ConfigError:
            return False
        return done is not None and done.state is End.DONE

    @property
    def finished(self) -> bool:
        """Whether nothing is left to wait for."""
        states = {change.state for change in self.journal.history.points.values()}
        return states <= ENDS or (states <= ENDS | {PointState.PLANNED} and bool(self._stop()))

    @property
    def unfinished(self) -> str:
        """Why points are left that have not ended; empty if there are none."""
        left = [name for name, change in self.journal.history.points.items() if change.state not in ENDS]
        why = self._contacts.silent_for(self.rules.outage) or self._stop() or "it was left"
        return f"{len(left)} of {len(self.run.points)} points have not ended: {why}" if left else ""

    def step(self) -> None:
        """Look at everything once and do what follows from it."""
        for name in self.run.points:
            self._read_folder(name)
        for place in sorted({change.place for change in self._changes() if change.place}):
            self._look(place)
        for name in self.run.points:
            self._end_what_must(name)
        if self.submits:
            self._submit()

    def _changes(self) -> Sequence[Change]:
        """Of the points that have not ended."""
        return [change for change in self.journal.history.points.values() if change.state not in ENDS]

    def _change(self, name: str, state: PointState, why: str = "", **given: Unpack[ChangeDetails]) -> None:
        """Write and say it, if it is news."""
        why = one_line(why)  # as the journal has it: or it would be news in every step
        old = self.journal.history.points[name]
        same = all(value == getattr(old, key) for key, value in given.items())
        if state is old.state and same and why in ("", old.why):
            return
        self.journal.change(name, state, why, **given)
        self.say(f"{name}: {state}{f' ({why})' if why else ''}")
        if state in ENDS | {PointState.PLANNED}:
            self._queue.forget(name)
            for memory in (self._absent, self._asked):
                memory.pop(name, None)

    def _note(self, text: str) -> None:
        text = one_line(text)
        self.journal.note(text)
        self.say(text)

    def _note_once(self, text: str) -> None:
        """For what is as true in the next step."""
        if all(note.text != one_line(text) for note in self.journal.history.notes):
            self._note(text)

    def _read_folder(self, name: str) -> None:
        """What the point's own files say: its end, or its phase."""
        state = self.journal.history.points[name].state
        if state in (PointState.FAILED, PointState.CANCELLED) and self._done_well(name):
            self._change(name, PointState.DONE, "after it had been given up")
        if state in ENDS or self._ended(name):
            return
        folder = self.folder.point(name)
        # a claim says nothing of a job that the last look has not shown
        if name not in self._absent and self._holder(name) is not None:
            self._change(name, phase_of(folder))

    def _holder(self, name: str) -> str | None:
        """The key of the attempt that holds the point."""
        try:
            holder = holder_of(self.folder.point(name).path)
        except ConfigError as error:
            self._note_once(f"{name}: {error}")
            return None
        return None if holder is None else holder.key

    def _ended(self, name: str) -> bool:
        """Whether the job has written its end: then that is the point's."""
        try:
            done = self.folder.read_done(name)
        except ConfigError as error:
            self._fail(name, f"its end can't be read: {error}")
            return True
        if done is None:
            return False
        if done.state is End.FAILED and self.folder.point(name).cancel.exists():
            self._change(name, PointState.CANCELLED, done.reason)
        elif done.state is End.FAILED:
            self._fail(name, self._doomed.pop(name, done.reason))
        else:
            self._change(name, PointState(done.state), done.reason)
            if done.state is End.DONE:
                self._breaker.succeeded()
            else:
                self._count_failure(done.reason)
        return True

    def _look(self, place: str) -> None:
        if self._contacts.paused(place):
            return
        there = [change for change in self._changes() if change.place == place]
        keys = [key for change in there for key in self._keys(change)]
        if not keys:
            return
        patience = self.launcher.patience()
        seen = self.launcher.look(place, keys)
        if isinstance(seen, Unreachable):
            self._contacts.failed(place, seen.why)
            for change in there:
                self._absent.pop(change.point, None)  # what waits at its door may still come
                if change.state in (PointState.SUBMITTING, PointState.QUEUED):
                    self._change(change.point, PointState.UNKNOWN, seen.why)
            return
        self._contacts.answered(place)
        for change in there:
            own = self._keys(change)
            self._judge(change.point, [job for job in seen.jobs if job.key in own], patience)

    def _keys(self, change: Change) -> list[str]:
        """Of all attempts so far: an old one may come late."""
        return [make_key(self.run.name, change.point, attempt) for attempt in range(1, change.attempt + 1)]

    def _judge(self, name: str, jobs: list[Sighting], patience: float) -> None:
        """What a clean look at a point's jobs means."""
        state = self.journal.history.points[name].state
        active = [job for job in jobs if job.phase is not JobPhase.ENDED]
        if active:
            self._absent.pop(name, None)
            first = next((job for job in active if job.phase is JobPhase.RUNNING), active[0])
            self._note_copies(name, active)
            if (why := self._queue.given_up(name, first)) is not None:
                self._doomed.setdefault(name, why)
            if state not in AT_WORK:
                runs = first.phase is JobPhase.RUNNING
                why = "" if runs else f"{first.word}: {first.why}" if first.why else first.word
                phase = phase_of(self.folder.point(name))
                self._change(name, phase if runs else PointState.QUEUED, why, job=first.job)
            return
        if state is PointState.PLANNED:
            return
        if name not in self._absent:
            self._absent[name] = self.clock.now()
            ended = f"ended as {jobs[-1].word}, and left no end" if jobs else "the launcher does not show it"
            self._change(name, PointState.UNKNOWN, ended)
        elif self.clock.now() - self._absent[name] > patience and not self._ended(name):
            self._gone(name, jobs)

    def _gone(self, name: str, jobs: list[Sighting]) -> None:
        """Two clean looks, apart, have shown nothing that runs or waits, and there is no end: so nothing comes."""
        change = self.journal.history.points[name]
        folder = self.folder.point(name)
        holder = self._holder(name)
        if holder is not None:
            revoke(folder.path, holder)  # what still runs there, unseen, ends without a word
        if name in self._doomed:
            self._fail(name, self._doomed.pop(name))
        elif folder.cancel.exists():
            self._change(name, PointState.CANCELLED, "as asked")
        elif holder is not None or jobs:
            how = f"ended as {jobs[-1].word}" if jobs else "is gone"
            words = last_words(folder, self._keys(change)[-1])
            why = f"attempt {change.attempt} {how} without a result{words and f'; its log ends: {words}'}"
            # never begun: that is no fault of the point, such as after a controller that lost its last seconds
            taken_away = holder is None and jobs[-1].word in TAKEN_AWAY
            if change.attempt < self.rules.attempts + (self.rules.losses if taken_away else 0):
                if not taken_away:
                    self._count_failure(why)
                self._change(name, PointState.PLANNED, why, attempt=change.attempt + 1, job="")
            else:
                self._fail(name, why)
        elif self.journal.history.accepted.get(name, 0) < self.rules.losses:
            self._change(name, PointState.PLANNED, "it was never there: two looks have shown nothing", job="")
        else:
            self._fail(name, f"it was taken {self.rules.losses} times, and each time two looks have shown nothing")

    def _note_copies(self, name: str, active: list[Sighting]) -> None:
        if len(active) > 1:
            numbers = ", ".join(job.job for job in active)
            self._note_once(f"{name} has {len(active)} jobs ({numbers}); the claim lets one of them run")

    def _end_what_must(self, name: str) -> None:
        """Cancels: asked again until a look shows their effect."""
        change = self.journal.history.points[name]
        asked = self.folder.point(name).cancel.exists()
        if change.state in ENDS or not (asked or name in self._doomed):
            return
        if change.state is PointState.PLANNED:
            self._change(name, PointState.CANCELLED, "as asked, before it began")
            return
        now, cancels = self.clock.now(), cancelling(change.place)
        if now - self._asked.get(name, -1e18) < self.rules.ask_again:
            return
        if self._contacts.paused(change.place) or self._contacts.paused(cancels):
            return
        for key in self._keys(change):
            if (why := self.launcher.cancel(change.place, key)) is not None:
                # apart from its looks, as a submission is
                self._contacts.failed(cancels, why)
                self._change(name, change.state, f"its cancel could not be asked: {why}")
                return
        self._contacts.answered(cancels)
        self._asked[name] = now

    def _submit(self) -> None:
        """Give planned points to places that have room and answer."""
        probed: set[str] = set()
        for name in self._ready():
            job = self.folder.read_job(name)
            place = self._free_place(job.node)
            if place is None:
                continue
            if place not in probed:
                if (why := self.launcher.probe(place)) is not None:
                    self._contacts.failed(place, why)
                    continue
                self._contacts.answered(place)
                probed.add(place)
            if not self._send(name, place, job):
                return

    def _ready(self) -> list[str]:
        """Planned points that may be submitted now, in the run's order: before all others the canary."""
        if self._stop():
            return []
        points = self.journal.history.points
        canary = self.run.canary
        alone = canary is not None and points[canary].state is not PointState.DONE
        return [
            name
            for name in self.run.points
            if points[name].state is PointState.PLANNED and (not alone or name == canary)
        ]

    def _free_place(self, node: str | None) -> str | None:
        taken = [change.place for change in self._changes() if change.state in SENT]
        for place, room in self.launcher.places.items():
            if node is not None and node != place and node in self.launcher.places:
                continue
            paused = self._contacts.paused(place) or self._contacts.paused(submitting(place))
            if not paused and (room is None or taken.count(place) < room):
                return place
        return None

    def _send(self, name: str, place: str, job: PointJob) -> bool:
        """Submit a point; whether the next one may follow at once."""
        attempt = max(1, self.journal.history.points[name].attempt)
        key = make_key(self.run.name, name, attempt)
        point = self.folder.point(name)
        attempt_folder = point.attempt(key).path
        attempt_folder.mkdir(parents=True, exist_ok=True)
        argv = (*self.job, str(point.path), "--key", key)
        self._change(name, PointState.SUBMITTING, attempt=attempt, place=place, job="")
        order = Order(key, argv, attempt_folder, node=job.node, seconds=job.deadlines.job)
        answer = self.launcher.submit(order, place)
        if isinstance(answer, Unsure):
            self._change(name, PointState.UNKNOWN, answer.why)
            # apart from its looks: a place that shows its queue at once may refuse jobs for an hour
            self._contacts.failed(submitting(place), answer.why)
            return False
        self._contacts.answered(submitting(place))
        if isinstance(answer, Rejected):
            self._fail(name, answer.why)
        else:
            self._change(name, PointState.QUEUED, job=answer.job)
        return True

    def _fail(self, name: str, why: str) -> None:
        self._change(name, PointState.FAILED, why)
        self._count_failure(why)

    def _count_failure(self, why: str) -> None:
        if self._breaker.failed(why):
            self._note(self._breaker.open)

    def _stop(self) -> str:
        """Why nothing more may be submitted; empty while it may."""
        canary = self.run.canary
        if canary is not None:
            state = self.journal.history.points[canary].state
            if state in ENDS - {PointState.DONE}:
                return f"the first point, {canary}, is {state}"
        return self._breaker.open
