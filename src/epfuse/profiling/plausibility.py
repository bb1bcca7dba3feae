"""Times that can't be: what a profile makes of them is arithmetic, so it must say so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import pairwise

from epfuse.profiling.events import Trace, TracedKernel

LONGEST_PAUSE = 3600 * 10**9
"""ns in which no GPU does anything, in one recording: an hour."""
FEW_EVENTS = 16
"""With fewer events a trace has no length to compare a kernel with, except `LONGEST_KERNEL`."""
LONGEST_KERNEL = 10 * 10**9
"""ns: ten seconds."""


@dataclass(frozen=True)
class TraceClock:
    """What is known of a trace's times.

    Attributes:
        first, last: start of the first and of the last event that is read, ns.
        grain: ns by which two times of the file may be off, for the way in which it writes them.
        negative: events that start before the clock's zero.
    """

    first: int
    last: int
    grain: int
    negative: int


def implausible_times(trace: Trace, clock: TraceClock) -> Iterator[str]:
    """A sentence for each kind of impossible time in the trace.

    Args:
        trace: with its kernels and copies in order of start.
        clock: of the file.
    """
    activities = list(merge(trace.kernels, trace.copies, key=lambda one: one.start))
    if clock.negative:
        yield f"{clock.negative} events start before the clock's zero (ts is negative)"
    if not activities:
        return
    yield from _stray(activities)
    yield from _longer_than_the_trace(activities, trace, clock)
    yield from _before_their_call(activities, trace, clock.grain)
    yield from _beside_themselves(activities, trace, clock.grain)


def _stray(activities: list[TracedKernel]) -> Iterator[str]:
    """Activities apart from all others, as one with ts 0 among times since boot."""
    pauses = [(after.start - before.start, at) for at, (before, after) in enumerate(pairwise(activities), 1)]
    pause, at = max(pauses, default=(0, 0))
    if pause > LONGEST_PAUSE:
        few = activities[:at] if 2 * at <= len(activities) else activities[at:]
        yield (
            f"{_of(few)} {pause / 1e9:.0f} s apart from all others (is ts 0 or damaged?):"
            " spans, steps and gaps that they are in are wrong"
        )


def _longer_than_the_trace(activities: list[TracedKernel], trace: Trace, clock: TraceClock) -> Iterator[str]:
    limit = max(clock.last - clock.first, 0 if trace.events >= FEW_EVENTS else LONGEST_KERNEL)
    long = [one for one in activities if one.duration > limit]
    if long:
        yield (
            f"{_of(long, 'last')} longer than the whole trace ({max(one.duration for one in long) / 1e6:.3f} ms):"
            " times that they are in are wrong"
        )


def _before_their_call(activities: list[TracedKernel], trace: Trace, grain: int) -> Iterator[str]:
    early = []
    most = 0
    for one in activities:
        launch = trace.launches.get(one.correlation) if one.correlation is not None else None
        if launch is not None and launch.start - one.start > grain:
            early.append(one)
            most = max(most, launch.start - one.start)
    if early:
        yield (
            f"{_of(early)} up to {most / 1e3:.3f} us before the call that launched them:"
            " the clocks of host and GPU disagree, or ids are mixed up; what gaps wait for is not certain"
        )


def _beside_themselves(activities: list[TracedKernel], trace: Trace, grain: int) -> Iterator[str]:
    until: dict[tuple[int, int], int] = {}
    overlap: dict[tuple[int, int], tuple[int, int]] = {}
    for one in activities:
        where = one.device, one.stream
        end = until.get(where, one.start)
        both = min(end, one.end) - one.start
        if both > grain:
            count, ns = overlap.get(where, (0, 0))
            overlap[where] = count + 1, ns + both
        until[where] = max(end, one.end)
    for (device, stream), (count, ns) in sorted(overlap.items())[:1]:
        name = trace.devices[device]
        owner = f" of {name.owner}" if name.owner else ""
        more = f", and on {len(overlap) - 1} more streams" if len(overlap) > 1 else ""
        yield (
            f"on stream {stream} of device {name.index}{owner} {count} activities run beside another one, for"
            f" {ns / 1e3:.3f} us in sum{more}: kernels that may begin early (dependent launches, a graph's branches),"
            " or wrong times; a phase counts each kernel's own time"
        )


def _of(activities: list[TracedKernel], verb: str = "start") -> str:
    return f"{len(activities)} activities {verb}" if len(activities) > 1 else f"1 activity {verb}s"
