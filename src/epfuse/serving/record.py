"""A run as it lies in its folder: every point's state, its legs measured anew, and the A/B verdicts.

What can't be read is said where it stands; everything else is still there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from epfuse.errors import ConfigError
from epfuse.input_file import read_object
from epfuse.profiling.text import printable
from epfuse.serving.done import Done, End, Leg
from epfuse.serving.facts import asked, flat
from epfuse.serving.journal import one_line, read_journal
from epfuse.serving.layout import LegFolder, RunFolder
from epfuse.serving.phases import Phases, read_phases
from epfuse.serving.point import Point, PointJob, Run
from epfuse.serving.results import MeasuredLoad, read_result
from epfuse.serving.verdict import PointVerdict, judge


@dataclass(frozen=True)
class LegRecord:
    """A leg, and what its requests say.

    Attributes:
        measured: None where it has no result that can be read; ``fault`` then says why, if it should have one.
        phases: of its trace; None where it has none that can be read; the same.
        files: words -> path relative to the run's folder, of what is there.
    """

    leg: Leg
    measured: MeasuredLoad | None
    fault: str
    files: dict[str, str]
    phases: Phases | None = None


@dataclass(frozen=True)
class PointRecord:
    """A point.

    Attributes:
        job: None where point.json can't be read.
        state: the end that its job wrote, else what the journal says.
        reason: of the state, or why a file can't be read.
        facts: of versions.json and of the arms in point.json, flat: ``arms.baseline.packages.vllm`` -> text.
    """

    name: str
    job: PointJob | None
    state: str
    reason: str
    done: Done | None
    legs: list[LegRecord] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def point(self) -> Point | None:
        """What was measured."""
        return None if self.job is None else self.job.point

    @property
    def arms(self) -> list[str]:
        """Names, the baseline's first; none where point.json can't be read."""
        return [] if self.job is None else [arm.name for arm in self.job.arms]

    @property
    def measured(self) -> Iterator[tuple[LegRecord, MeasuredLoad]]:
        """Legs that ended well and have numbers."""
        for record in self.legs:
            if record.leg.state is End.DONE and record.measured is not None:
                yield record, record.measured

    @property
    def profiled(self) -> dict[str, Phases]:
        """Arm -> phases of its first trace."""
        found: dict[str, Phases] = {}
        for record in self.legs:
            if record.phases is not None:
                found.setdefault(record.leg.arm, record.phases)
        return found

    def log_ratios(self, baseline: str, candidate: str) -> list[float]:
        """Of each whole pair, log(candidate / baseline) of the total throughput."""
        throughput = {record.leg.number: (record.leg.arm, found.total_throughput) for record, found in self.measured}
        ratios = []
        for first in range(1, len(self.legs) + 1, 2):
            pair = dict(throughput[number] for number in (first, first + 1) if number in throughput)
            if set(pair) == {baseline, candidate} and min(pair.values()) > 0:
                ratios.append(math.log(pair[candidate] / pair[baseline]))
        return ratios


@dataclass(frozen=True)
class RunRecord:
    """A run.

    Attributes:
        verdicts: point -> verdict, of those that have more than one pair by design; empty without a comparison.
        faults: of files that belong to no point.
    """

    run: Run
    points: list[PointRecord]
    verdicts: dict[str, PointVerdict]
    faults: list[str]

    @property
    def ok(self) -> bool:
        """Every point ended well and every result could be read."""
        return not self.faults and all(
            point.state == End.DONE and all(not record.fault for record in point.legs) for point in self.points
        )


def collect(folder: RunFolder, progress: Callable[[int, int], None] = lambda done, total: None) -> RunRecord:
    """Read a run.

    Args:
        folder: of the run.
        progress: called with points read and points in all.

    Raises:
        ConfigError: run.json can't be read; of all else the record says it.
    """
    run = folder.read_run()
    faults: list[str] = []
    states: dict[str, tuple[str, str]] = {}
    if folder.journal.exists():
        try:
            states = {name: (change.state, change.why) for name, change in read_journal(folder.journal).points.items()}
        except ConfigError as error:
            faults.append(_shown(error, folder))
    points = []
    for number, name in enumerate(run.points):
        progress(number, len(run.points))
        points.append(_point(folder, run, name, *states.get(name, ("planned", ""))))
    progress(len(run.points), len(run.points))
    verdicts: dict[str, PointVerdict] = {}
    if run.compare is not None:
        compare = run.compare
        compared = [point for point in points if point.job is not None and _pairs_of(point.job) > 1]
        ratios = {point.name: point.log_ratios(compare.baseline, compare.candidate) for point in compared}
        verdicts = judge(ratios, compare)
    return RunRecord(run, points, verdicts, faults)


def _pairs_of(job: PointJob) -> int:
    return len(job.order) // 2 if len(job.arms) > 1 else 0


def _point(folder: RunFolder, run: Run, name: str, state: str, why: str) -> PointRecord:
    place = folder.point(name)
    job: PointJob | None = None
    done: Done | None = None
    reasons = [why] if why else []
    try:
        job = folder.read_job(name)
    except ConfigError as error:
        reasons.append(_shown(error, folder))
    try:
        done = folder.read_done(name)
    except ConfigError as error:
        state, reasons = "unreadable", [*reasons, _shown(error, folder)]
    if done is None:
        return PointRecord(name, job, state, "; ".join(reasons), None)
    attempt = place.attempt(done.key)
    facts = {} if job is None else asked(job)
    if attempt.versions.exists():
        try:
            facts |= flat(read_object(attempt.versions, "versions"))
        except ConfigError as error:
            reasons.append(_shown(error, folder))
    concurrency = 1 if job is None else job.client.concurrency
    legs = _without_wrong_arms([_leg(folder, name, leg, concurrency) for leg in done.legs], job)
    reason = "; ".join(dict.fromkeys(filter(None, (one_line(done.reason), *reasons))))
    files = _there(folder, {"job": attempt.job_log, "versions": attempt.versions, "end": place.done})
    return PointRecord(name, job, done.state, reason, done, legs, facts, files)


def _without_wrong_arms(legs: list[LegRecord], job: PointJob | None) -> list[LegRecord]:
    """The legs; none of an arm has a speed whose answers one of its servers had wrong: they all may have been.

    Of a wrong baseline nobody's answers were compared with right ones.
    """
    wrong = {record.leg.arm: record.leg.number for record in legs if record.leg.state is End.GATED_OUT}
    if job is not None and (baseline := job.arms[0].name) in wrong:
        wrong = {record.leg.arm: wrong[baseline] for record in legs}
    found = []
    for record in legs:
        if record.measured is not None and record.leg.arm in wrong:
            why = f"its speed does not count: leg {wrong[record.leg.arm]} did not pass the gate"
            record = replace(record, measured=None, leg=record.leg.model_copy(update={"reason": why}))
        found.append(record)
    return found


def _leg(folder: RunFolder, name: str, leg: Leg, concurrency: int) -> LegRecord:
    point = folder.point(name).path
    path = point / leg.folder
    if not path.resolve().is_relative_to(point.resolve()):
        return LegRecord(leg, None, f"folder {printable(leg.folder)} is not in the point's", {})
    files = LegFolder(path)
    there = {"result": files.result, "server": files.server_log, "client": files.client_log, "gate": files.gate}
    there |= {"GPUs": files.gpu_samples, "trace": files.trace, "profile": files.profile}
    measured, phases, faults = None, None, []
    if leg.state is End.DONE and (leg.metrics or files.result.exists()):
        try:
            measured = read_result(files.result, concurrency)
        except ConfigError as error:
            faults.append(_shown(error, folder))
    if files.profile.exists():
        try:
            phases = read_phases(files.profile)
        except ConfigError as error:
            faults.append(_shown(error, folder))
    return LegRecord(leg, measured, "; ".join(faults), _there(folder, there), phases)


def _there(folder: RunFolder, files: Mapping[str, Path]) -> dict[str, str]:
    return {word: str(path.relative_to(folder.path)) for word, path in files.items() if path.is_file()}


def _shown(error: ConfigError, folder: RunFolder) -> str:
    """A fault without the path that leads to the run's folder: a report is read elsewhere."""
    return printable(str(error).replace(f"{folder.path}/", ""))[:500]
