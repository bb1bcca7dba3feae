"""Busy time, gaps and overlap of GPU activities; all times in ns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from epfuse.profiling.events import TracedKernel, TracedLaunch

Interval = tuple[int, int]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times without overlap, in order; intervals that touch become one."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            if end > merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> int:
    """Sum of the intervals' lengths."""
    return sum(end - start for start, end in intervals)


def busy(activities: Iterable[TracedKernel]) -> int:
    """Time in which at least one of them runs, on any stream."""
    return length(union((a.start, a.end) for a in activities))


@dataclass(frozen=True)
class Gaps:
    """Idle time of a stream between its first and last activity, by what it waits for.

    Attributes:
        host_late: the launching call had not begun: the host is behind.
        launch: the launching call was under way.
        device: the work had been launched, and the device did not start it: dependencies, scheduling, or the pause
            between a graph's kernels.
        unknown: the trace does not tell which call launched what follows.
    """

    host_late: int = 0
    launch: int = 0
    device: int = 0
    unknown: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.host_late + self.launch + self.device + self.unknown

    def __add__(self, other: Gaps) -> Gaps:
        return Gaps(
            self.host_late + other.host_late,
            self.launch + other.launch,
            self.device + other.device,
            self.unknown + other.unknown,
        )


@dataclass(frozen=True)
class Pause:
    """A time in which a device runs nothing.

    Attributes:
        start: in ns.
        before: the activity that ends it.
    """

    start: int
    before: TracedKernel

    @property
    def end(self) -> int:
        """In ns."""
        return self.before.start

    @property
    def duration(self) -> int:
        """In ns."""
        return self.end - self.start


def pauses(activities: Iterable[TracedKernel]) -> list[Pause]:
    """Every time between the first and the last activity in which none of them runs, in order."""
    ordered = sorted(activities, key=lambda a: (a.start, a.stream, a.name))  # whatever the order of the file
    found = []
    until = ordered[0].end if ordered else 0
    for activity in ordered:
        if activity.start > until:
            found.append(Pause(until, activity))
        until = max(until, activity.end)
    return found


@dataclass(frozen=True)
class StreamTime:
    """One stream in a window.

    Attributes:
        stream: its id.
        kernels: how many.
        busy: time in which it runs something.
        gaps: the rest, up to its last activity.
    """

    stream: int
    kernels: int
    busy: int
    gaps: Gaps


def stream_time(
    stream: int, activities: Sequence[TracedKernel], launches: Mapping[Hashable, TracedLaunch], kernels: int
) -> StreamTime:
    """Busy time and gaps of one stream.

    Args:
        stream: its id.
        activities: of that stream, in order of start.
        launches: see `Trace`.
        kernels: how many of the activities are kernels.
    """
    gaps = Gaps()
    until = activities[0].end
    for activity in activities[1:]:
        if activity.start > until:
            launch = launches.get(activity.correlation) if activity.correlation is not None else None
            gaps += _split((until, activity.start), launch)
        until = max(until, activity.end)
    return StreamTime(stream, kernels, busy(activities), gaps)


def _split(gap: Interval, launch: TracedLaunch | None) -> Gaps:
    begin, end = gap
    if launch is None:
        return Gaps(unknown=end - begin)
    called = min(max(launch.start, begin), end)
    returned = min(max(launch.end, called), end)
    return Gaps(host_late=called - begin, launch=returned - called, device=end - returned)


def streams_of(
    kernels: Sequence[TracedKernel], copies: Sequence[TracedKernel], launches: Mapping[Hashable, TracedLaunch]
) -> list[StreamTime]:
    """Every stream's time, by stream id."""
    activities: dict[int, list[TracedKernel]] = defaultdict(list)
    for activity in sorted([*kernels, *copies], key=lambda a: a.start):
        activities[activity.stream].append(activity)
    counts: dict[int, int] = defaultdict(int)
    for kernel in kernels:
        counts[kernel.stream] += 1
    return [stream_time(stream, activities[stream], launches, counts[stream]) for stream in sorted(activities)]


def merge_steps(times: Iterable[StreamTime]) -> list[StreamTime]:
    """One time a stream, summed over several steps; what lies between steps is in no step."""
    merged: dict[int, StreamTime] = {}
    for time in times:
        before = merged.get(time.stream, StreamTime(time.stream, 0, 0, Gaps()))
        merged[time.stream] = StreamTime(
            time.stream, before.kernels + time.kernels, before.busy + time.busy, before.gaps + time.gaps
        )
    return [merged[stream] for stream in sorted(merged)]


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest ranks; ``share`` in 0..1."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
