"""Which named ranges a kernel was launched in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

from epfuse.profiling.events import Kernel, Range, Trace


def enclosing(ranges: Iterable[Range], moments: Iterable[tuple[Hashable, int, int]]) -> dict[int, tuple[Range, ...]]:
    """For each moment the ranges around it, outermost first.

    Args:
        ranges: on any threads, in any order; those of one thread are nested.
        moments: thread, time (ns), and a key for the result; keys without a range are left out.
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
        nested = sorted(by_thread[thread], key=lambda item: (item.start, -item.duration))
        stack: list[Range] = []
        frozen: tuple[Range, ...] = ()
        position = 0
        for moment, key in sorted(wanted):
            while position < len(nested) and nested[position].start <= moment:
                opened = nested[position]
                while stack and stack[-1].end <= opened.start:
                    stack.pop()
                stack.append(opened)
                position += 1
            while stack and stack[-1].end <= moment:
                stack.pop()
            if len(frozen) != len(stack) or any(a is not b for a, b in zip(frozen, stack, strict=True)):
                frozen = tuple(stack)
            if stack:
                found[key] = frozen
    return found


def host_ranges(trace: Trace, kernels: Sequence[Kernel]) -> list[tuple[Range, ...]]:
    """For each kernel the ranges on the host that enclose its launch, outermost first.

    A kernel without a known launch has those on the GPU's own timeline.
    """
    launched = []
    unlinked = []
    for index, kernel in enumerate(kernels):
        launch = trace.launches.get(kernel.correlation) if kernel.correlation is not None else None
        if launch is not None:
            launched.append((launch.thread, launch.start, index))
        else:
            unlinked.append(((kernel.device, kernel.stream), kernel.start, index))
    found = enclosing(trace.ranges, launched) | enclosing(trace.gpu_ranges, unlinked)
    return [found.get(index, ()) for index in range(len(kernels))]
