"""Which event belongs to which: ids of a trace are neither global nor of one type.

Correlation ids count up from 1 in every process, devices in every process that sees only its own, streams in every
device; tools that merge ranks' traces into one file leave them as they are and write another pid, or put a rank's name
before it. So an id means something only together with what it belongs to.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from epfuse.profiling.events import TracedDevice, TracedKernel, TracedLaunch
from epfuse.profiling.text import printable

LONGEST_ID = 200
"""Characters of a pid or tid that is a text."""
EXACT = 2**53
"""From here on a float, which is what many tools' numbers are, may stand for several ids."""
MOST_CANDIDATES = 64
"""Processes that one correlation id is looked up in; with more, nobody knows whose it is."""
SKEW = 1_000_000
"""ns that the clocks of host and GPU may be apart when a kernel is matched with one of several processes' calls."""
HOME_SHARE = 0.9
"""A device whose kernels were launched by one process to this share belongs to that process."""

Id = int | str
Process = tuple[str, Id | None]
"""Name that a merging tool put before the pid (empty if none), and the pid."""

_DIGITS = re.compile(r"-?[0-9]{1,19}")
_MERGED = re.compile(r"\[([^\[\]]{1,80})\] ?(.+)", re.DOTALL)


def identity(value: Any) -> Id | None:
    """One form of an id that tools write as 7, 7.0 or "7"; None for what is no id, or not an exact one."""
    if type(value) is int:
        return value if -EXACT * 2048 <= value < EXACT * 2048 else None
    if type(value) is float:
        return int(value) if value.is_integer() and -EXACT < value < EXACT else None
    if type(value) is str and 0 < len(value) <= LONGEST_ID:
        return int(value) if _DIGITS.fullmatch(value) else value
    return None


def process_of(pid: Any) -> Process:
    """The process, and what a merging tool calls its rank: "[TP00] 553" is SGLang's process 553 of TP00."""
    if type(pid) is str and (match := _MERGED.fullmatch(pid[: 2 * LONGEST_ID])):
        return match[1], identity(match[2])
    return "", identity(pid)


@dataclass(frozen=True)
class DeviceKey:
    """A GPU, as an event names it: its process (of GPU events the pid is the device too) and its own index."""

    owner: Process
    index: int


class Devices:
    """Gives every GPU of a trace a number: its own index where no other GPU has the same one."""

    def __init__(self) -> None:
        self._seen: dict[DeviceKey, int] = {}

    def number(self, key: DeviceKey) -> int:
        """For now; `final` may change it."""
        return self._seen.setdefault(key, len(self._seen))

    def final(self) -> dict[int, tuple[int, DeviceKey]]:
        """Provisional number -> final number and key; the same whatever order the events came in."""
        by_index: dict[int, list[DeviceKey]] = defaultdict(list)
        for key in self._seen:
            by_index[key.index].append(key)
        free = max(by_index, default=-1) + 1
        numbers = {}
        for index in sorted(by_index):
            for position, key in enumerate(sorted(by_index[index], key=repr)):
                number = index
                if position:
                    number, free = free, free + 1
                numbers[self._seen[key]] = number, key
        return numbers


def describe_devices(
    final: Mapping[int, tuple[int, DeviceKey]], properties: Mapping[int, TracedDevice | None], is_rocm: bool
) -> dict[int, TracedDevice]:
    """What the trace says of each GPU, by final number.

    Args:
        final: see `Devices.final`.
        properties: what the trace lists, by index; None for an index that is listed twice, and differently.
        is_rocm: ROCm's kernels name an agent (CPUs are agents too), its list counts GPUs: an index of the one is none
            of the other, and only a list in which all GPUs are alike says what a kernel's is.
    """
    listed = list(properties.values())
    alike = listed[0] if listed and all(_same_kind(listed[0], other) for other in listed) else None
    shared = Counter(key.index for _, key in final.values())
    described = {}
    for number, key in final.values():
        known = alike if alike is not None or is_rocm else properties.get(key.index)
        owner = ""
        if shared[key.index] > 1:
            owner = printable(key.owner[0] or f"pid {key.owner[1]}")
        described[number] = replace(known or TracedDevice(key.index), index=key.index, owner=owner)
    return described


def _same_kind(a: TracedDevice | None, b: TracedDevice | None) -> bool:
    return a is not None and b is not None and replace(a, index=b.index) == b


class Calls:
    """Launching calls by process and correlation id, and which kernel belongs to which."""

    def __init__(self) -> None:
        self._calls: dict[Process, dict[Id, TracedLaunch]] = defaultdict(dict)
        self._repeated: dict[tuple[Process, Id], list[TracedLaunch]] = {}

    def add(self, process: Process, correlation: Id, launch: TracedLaunch) -> None:
        """One call."""
        first = self._calls[process].setdefault(correlation, launch)
        if first is not launch:
            self._repeated.setdefault((process, correlation), [first]).append(launch)

    def resolve(self) -> int:
        """Settle ids that one process has given twice; returns how many say nothing, and are forgotten.

        A runtime call and the driver call inside it are one launch, the outer one.
        """
        lost = 0
        for (process, correlation), launches in self._repeated.items():
            outer = min(launches, key=lambda one: (one.start, -one.duration, one.name))
            if all(one.end <= outer.end and one.thread == outer.thread for one in launches):
                self._calls[process][correlation] = outer
            else:
                del self._calls[process][correlation]
                lost += 1
        self._repeated.clear()
        return lost

    def link(
        self, activities: list[TracedKernel], origins: Mapping[int, str]
    ) -> tuple[dict[Hashable, TracedLaunch], int]:
        """Replace each activity's correlation id by the key of its call, or None; in place.

        Args:
            activities: of all devices.
            origins: device number -> name of the rank that a merging tool gave; empty if it gave none.

        Returns:
            key -> call, and how many activities' ids belong to several processes, nobody knows which.
        """
        if len(self._calls) < 2 and len(set(origins.values())) < 2:
            return {c: launch for calls in self._calls.values() for c, launch in calls.items()}, 0
        callers: dict[Id, list[Process]] = defaultdict(list)
        for process, calls in self._calls.items():
            for correlation in calls:
                callers[correlation].append(process)
        candidates = [self._candidates(activity, callers, origins) for activity in activities]
        votes: dict[int, Counter[Process]] = defaultdict(Counter)
        for activity, processes in zip(activities, candidates, strict=True):
            if len(processes) == 1:
                votes[activity.device][processes[0]] += 1
        homes = {device: _home(counts) for device, counts in votes.items()}
        unknown = 0
        for index, (activity, processes) in enumerate(zip(activities, candidates, strict=True)):
            home = homes.get(activity.device)
            key = None
            if home is not None:
                key = (home, activity.correlation) if home in processes else None
            elif len(processes) == 1:
                key = processes[0], activity.correlation
            unknown += key is None and len(processes) > 0
            activities[index] = activity._replace(correlation=key)
        return {(process, c): launch for process, calls in self._calls.items() for c, launch in calls.items()}, unknown

    def _candidates(
        self, activity: TracedKernel, callers: Mapping[Id, list[Process]], origins: Mapping[int, str]
    ) -> list[Process]:
        """The processes with a call of that id that the activity can come from."""
        correlation = activity.correlation
        if not isinstance(correlation, int | str) or correlation not in callers:
            return []
        origin = origins.get(activity.device, "")
        if len(callers[correlation]) > MOST_CANDIDATES:
            return callers[correlation][:2]
        processes = [p for p in callers[correlation] if not origin or p[0] == origin]
        return [p for p in processes if self._calls[p][correlation].start <= activity.start + SKEW]


def _home(counts: Counter[Process]) -> Process | None:
    process, votes = counts.most_common(1)[0]
    return process if votes >= HOME_SHARE * counts.total() else None
