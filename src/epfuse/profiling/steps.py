"""The steps of one device in a trace, and the choice of those to profile."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from epfuse.errors import ConfigError
from epfuse.profiling.annotations import PROFILER_STEP, StepKind, StepLabel, parse_label
from epfuse.profiling.events import Range, Trace, TracedKernel
from epfuse.profiling.layers import busiest_stream, find_skeleton
from epfuse.profiling.ranges import host_ranges


@dataclass(frozen=True)
class TracedStep:
    """One run of the model on one device.

    Attributes:
        index: among the device's steps, from 0.
        label: what the server says of it; its text is empty if no annotation does.
        kernels: in order of start.
        ranges: for each kernel the host ranges around its launch.
        copies: memcpy and memset that were launched with them.
    """

    index: int
    label: StepLabel
    kernels: list[TracedKernel]
    ranges: list[tuple[Range, ...]]
    copies: list[TracedKernel]

    @property
    def start(self) -> int:
        """Of the first activity, ns."""
        return min(a.start for a in (*self.kernels, *self.copies))

    @property
    def end(self) -> int:
        """Of the last activity, ns."""
        return max(a.end for a in (*self.kernels, *self.copies))

    @property
    def span(self) -> int:
        """From the first activity's start to the last one's end, ns."""
        return self.end - self.start


@dataclass(frozen=True)
class DeviceSteps:
    """All of one device.

    Attributes:
        device: its number in the trace.
        steps: in order of time.
        found_by: ``annotations``, ``repetition`` or ``nothing`` (then the whole trace is the one step).
        outside: kernels in no step.
    """

    device: int
    steps: list[TracedStep]
    found_by: str
    outside: list[TracedKernel]


def find_steps(trace: Trace) -> dict[int, DeviceSteps]:
    """The steps of every device with kernels, by annotations or, where no server wrote any, by what repeats.

    Raises:
        TraceError: see `host_ranges`.
    """
    kernels = _by_device(trace.kernels, host_ranges(trace, trace.kernels))
    copies = _by_device(trace.copies, host_ranges(trace, trace.copies))
    return {device: _steps_of(device, kernels[device], copies.get(device, ([], []))) for device in sorted(kernels)}


_Activities = tuple[list[TracedKernel], list[tuple[Range, ...]]]
"""Of one device, in order of start, and the ranges around each one's launch."""


def _by_device(activities: Sequence[TracedKernel], ranges: Sequence[tuple[Range, ...]]) -> dict[int, _Activities]:
    found: dict[int, _Activities] = {}
    for activity, around in zip(activities, ranges, strict=True):
        own, own_ranges = found.setdefault(activity.device, ([], []))
        own.append(activity)
        own_ranges.append(around)
    return found


def _steps_of(device: int, activities: _Activities, copied: _Activities) -> DeviceSteps:
    kernels, ranges = activities
    copies, copy_ranges = copied
    annotated = _by_annotations(kernels, ranges, copies, copy_ranges)
    if annotated is not None:
        steps, outside = annotated
        return DeviceSteps(device, steps, "annotations", outside)
    cuts = _repeated_cuts(kernels)
    bounds = [0, *cuts, len(kernels)]
    begins = [copy.start for copy in copies]
    unnamed = StepLabel("", StepKind.UNKNOWN)
    steps = []
    for index, (first, stop) in enumerate(pairwise(bounds)):
        since = bisect_left(begins, kernels[first].start) if index else 0
        until = bisect_left(begins, kernels[stop].start) if stop < len(kernels) else len(copies)
        steps.append(TracedStep(index, unnamed, kernels[first:stop], ranges[first:stop], copies[since:until]))
    return DeviceSteps(device, steps, "repetition" if cuts else "nothing", [])


def _by_annotations(
    kernels: Sequence[TracedKernel],
    ranges: Sequence[tuple[Range, ...]],
    copies: Sequence[TracedKernel],
    copy_ranges: Sequence[tuple[Range, ...]],
) -> tuple[list[TracedStep], list[TracedKernel]] | None:
    label_of = _step_of_ranges(ranges)
    members: dict[Range, list[int]] = defaultdict(list)
    outside = []
    for index, around in enumerate(ranges):
        found = label_of(around)
        if found is None:
            outside.append(kernels[index])
        else:
            members[found].append(index)
    if not members:
        return None
    copied: dict[Range, list[TracedKernel]] = defaultdict(list)
    for copy, around in zip(copies, copy_ranges, strict=True):
        if (found := label_of(around)) is not None:
            copied[found].append(copy)
    steps = []
    for index, (step, indices) in enumerate(sorted(members.items(), key=lambda item: kernels[item[1][0]].start)):
        label = parse_label(step.name) or StepLabel(step.name, StepKind.UNKNOWN)
        steps.append(
            TracedStep(index, label, [kernels[i] for i in indices], [ranges[i] for i in indices], copied[step])
        )
    return steps, outside


def _step_of_ranges(ranges: Sequence[tuple[Range, ...]]) -> Callable[[tuple[Range, ...]], Range | None]:
    """A function from enclosing ranges to the one that is the step.

    A server's annotation is preferred to the profiler's own step, in which several server steps may lie.
    """
    names = {item.name for around in set(ranges) for item in around}
    labels = {name for name in names if parse_label(name)}
    if any(not PROFILER_STEP.fullmatch(name) for name in labels):
        labels = {name for name in labels if not PROFILER_STEP.fullmatch(name)}
    return lambda around: next((item for item in around if item.name in labels), None)


def _repeated_cuts(kernels: Sequence[TracedKernel]) -> list[int]:
    """Indices of the kernels that begin the second, third, ... step.

    Between two layers of one step stands what stands between most layers. Where more does (logits, sampling, the
    next step's embedding), the step changes, at the longest pause.
    """
    stream = busiest_stream(kernels)
    indices = [index for index, kernel in enumerate(kernels) if kernel.stream == stream]
    names = [kernels[index].name for index in indices]
    skeleton = find_skeleton(names)
    if skeleton is None:
        return []
    gaps = [(end + 1, start) for end, start in zip(skeleton.ends, skeleton.starts[1:], strict=False)]
    shares = Counter(name for first, stop in gaps for name in set(names[first:stop]))
    usual = {name for name, count in shares.items() if 2 * count > len(gaps)}
    cuts = []
    for first, stop in gaps:
        if all(name in usual for name in names[first:stop]):
            continue
        pauses = {
            here: kernels[indices[here]].start - kernels[indices[here - 1]].end for here in range(first, stop + 1)
        }
        cuts.append(indices[max(pauses, key=lambda here: pauses[here])])
    return cuts


AUTO = "auto"
_INDEX = re.compile(r"\d{1,9}")
_SPAN = re.compile(r"(\d{1,9})\.\.(\d{1,9})")


def check_window(window: str) -> tuple[int, int] | None:
    """First and last index that a window names; None for ``auto``.

    Raises:
        ConfigError: it is not ``auto``, an index or ``first..last``.
    """
    if window == AUTO:
        return None
    if match := _SPAN.fullmatch(window):
        first, last = int(match[1]), int(match[2])
        if first <= last:
            return first, last
    elif _INDEX.fullmatch(window):
        return int(window), int(window)
    raise ConfigError(f"window is {window!r:.80}; it must be 'auto', an index or first..last, first not after last")


def choose_steps(found: DeviceSteps, window: str) -> list[TracedStep]:
    """The steps that a window names.

    Args:
        found: the device's steps, at least one.
        window: ``auto``, the decode step of median duration (of all steps if none decodes); an index; or
            ``first..last``, both included.

    Raises:
        ConfigError: it is none of these, or the trace has no such step.
    """
    steps = found.steps
    bounds = check_window(window)
    if bounds is None:
        decode = [step for step in steps if step.label.kind is StepKind.DECODE] or steps
        return [sorted(decode, key=lambda step: step.span)[(len(decode) - 1) // 2]]
    first, last = bounds
    if last >= len(steps):
        raise ConfigError(f"window is {window!r}; device {found.device} has the steps 0..{len(steps) - 1}")
    return steps[first : last + 1]
