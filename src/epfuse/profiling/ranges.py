"""Which named ranges a kernel was launched in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

from epfuse.errors import TraceError
from epfuse.profiling.events import Range, Trace, TracedKernel

MOST_OPEN = 128
"""Ranges that may be open at once in one thread: modules and record_function lie some twenty deep."""


class TooManyOpen(ValueError):
    """More than `MOST_OPEN` ranges are open at once."""


def enclosing(ranges: Iterable[Range], moments: Iterable[tuple[Hashable, int, int]]) -> dict[int, tuple[Range, ...]]:
    """For each moment the ranges around it, outermost first: by their start, the longer one first.

    Args:
        ranges: on any threads, in any order; they may overlap without one being in the other.
        moments: thread, time (ns), and a key for the result; keys without a range are left out.

    Raises:
        TooManyOpen: what encloses all moments would not fit into memory.
    """
    by_thread: dict[Hashable, list[Range]] = defaultdict(list)
    for item in ranges:
        by_thread[item.thread].append(item)
    asked: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    for thread, moment, key in moments:
        if thread in by_thread:
            asked[thread].append((moment, key))
    found: dict[int, tuple[Range, ...]] = {}
    for thread, wanted in asked.items():
        starting = sorted(by_thread[thread], key=lambda item: (item.start, -item.duration, item.name))
        around = _Open()
        position = 0
        for moment, key in sorted(wanted):
            while position < len(starting) and starting[position].start <= moment:
                around.begin(starting[position])
                position += 1
            if now := around.at(moment):
                found[key] = now
    return found


class _Open:
    """The ranges that are open, as time goes on."""

    def __init__(self) -> None:
        self._ranges: list[Range] = []
        self._tuple: tuple[Range, ...] | None = ()
        self._next_end: float = float("inf")

    def begin(self, item: Range) -> None:
        self.at(item.start)
        if len(self._ranges) == MOST_OPEN:
            raise TooManyOpen(f"more than {MOST_OPEN} ranges are open at once, {item.name!r:.80} among them")
        self._ranges.append(item)
        self._tuple = None
        self._next_end = min(self._next_end, item.end)

    def at(self, moment: int) -> tuple[Range, ...]:
        """Those around a moment; the same object as long as they are the same."""
        if moment >= self._next_end:
            self._ranges = [item for item in self._ranges if item.end > moment]
            self._next_end = min((item.end for item in self._ranges), default=float("inf"))
            self._tuple = None
        if self._tuple is None:
            self._tuple = tuple(self._ranges)
        return self._tuple


def host_ranges(trace: Trace, kernels: Sequence[TracedKernel]) -> list[tuple[Range, ...]]:
    """For each kernel, of any device, the ranges on the host that enclose its launch, outermost first.

    A kernel without a known launch has those on the GPU's own timeline.

    Raises:
        TraceError: too many ranges are open at once.
    """
    launched = []
    unlinked = []
    for index, kernel in enumerate(kernels):
        launch = trace.launches.get(kernel.correlation) if kernel.correlation is not None else None
        if launch is not None:
            launched.append((launch.thread, launch.start, index))
        else:
            unlinked.append(((kernel.device, kernel.stream), kernel.start, index))
    try:
        found = enclosing(trace.ranges, launched) | enclosing(trace.gpu_ranges, unlinked)
    except TooManyOpen as error:
        raise TraceError(f"{trace.path} can't be profiled: {error}; in one thread a range lies in the other") from None
    return [found.get(index, ()) for index in range(len(kernels))]
