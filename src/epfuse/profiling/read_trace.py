"""Kineto's Chrome traces, from CUDA and from ROCm, into a `Trace`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from epfuse.errors import TraceError
from epfuse.profiling.events import Range, Trace, TracedDevice, TracedKernel, TracedLaunch
from epfuse.profiling.identities import Calls, DeviceKey, Devices, describe_devices, identity, process_of
from epfuse.profiling.json_stream import Progress, stream_events
from epfuse.profiling.plausibility import TraceClock, implausible_times
from epfuse.profiling.text import printable

LONGEST_NAME = 4096
"""Characters of a name that are kept; C++ template names reach a few thousand."""

MOST_NAMES = 64 << 20
"""Characters of all different names and ids: a server has a few thousand kernels and modules."""

MOST_EVENTS = 4_500_000
"""Activities, launching calls and ranges that are kept, of about 400 bytes each."""

MOST_DEVICES = 1024
"""GPUs in one trace."""

LATEST = 1e17
"""Microseconds (3000 years): more is no time, and neither are infinity and NaN, which Python's JSON reads."""

MODULE_PREFIX = "nn.Module: "
"""Python functions with this prefix are modules' forwards (profiles with stacks); all others are dropped."""


def read_trace(path: Path, progress: Progress | None = None) -> Trace:
    """Read one trace file, plain or gzipped, whatever the order of its events.

    Args:
        path: the file.
        progress: see `stream_events`.

    Raises:
        TraceError: the file can't be read, is no trace, is cut short, has more than can be kept, or an event has no
            usable time.
    """
    builder = _Builder(path)
    for event in stream_events(path, builder.on_value, progress):
        builder.on_event(event)
    return builder.finish()


class _Builder:
    def __init__(self, path: Path) -> None:
        self.trace = Trace(path=printable(str(path)))
        self.base: int | None = None
        self.clock = _ClockReader()
        self.names: dict[str, str] = {}
        self.text_left = MOST_NAMES
        self.events_left = MOST_EVENTS
        self.threads: dict[Hashable, Hashable] = {}  # one object a thread, not one a launch
        self.devices = Devices()
        self.calls = Calls()
        self.inexact = 0
        self.properties: dict[int, TracedDevice | None] = {}
        self.is_rocm = False
        self.handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            "kernel": self._kernel,
            "gpu_memcpy": self._copy,
            "gpu_memset": self._copy,
            "cuda_runtime": self._launch,
            "cuda_driver": self._launch,
            "hip_runtime": self._launch,
            "user_annotation": self._range,
            "gpu_user_annotation": self._gpu_range,
            "python_function": self._module,
        }

    def on_value(self, key: str, value: Any) -> None:
        if key.startswith(("hip_", "roctracer_", "rocprofiler_")):
            self.is_rocm = True
        elif key == "deviceProperties" and isinstance(value, list):
            for properties in value:
                if isinstance(properties, dict):
                    device = _device(properties)
                    known = self.properties.setdefault(device.index, device)
                    if known != device:  # merged from hosts of different kinds: nobody knows which one is meant
                        self.properties[device.index] = None
        elif key == "distributedInfo" and isinstance(value, dict):
            rank = value.get("rank")
            self.trace.rank = rank if type(rank) is int else None

    def on_event(self, event: dict[str, Any]) -> None:
        self.trace.events += 1
        category = event.get("cat")
        if event.get("ph") == "X" and isinstance(category, str) and category in self.handlers:
            self.handlers[category](event)

    def finish(self) -> Trace:
        trace = self.trace
        final = self.devices.final()
        if len(final) > MOST_DEVICES:
            raise TraceError(f"{trace.path} has kernels of {len(final)} devices; it may have {MOST_DEVICES}")
        if any(number != provisional for provisional, (number, _) in final.items()):
            numbers = {provisional: number for provisional, (number, _) in final.items()}
            for activities in (trace.kernels, trace.copies):
                activities[:] = [one._replace(device=numbers[one.device]) for one in activities]
            trace.gpu_ranges = [_moved(item, numbers) for item in trace.gpu_ranges]
        is_rocm = self.is_rocm or any(d is not None and d.warp_size == 64 for d in self.properties.values())
        trace.devices = describe_devices(final, self.properties, is_rocm)
        self._link({number: key.owner[0] for number, key in final.values()})
        for activities in (trace.kernels, trace.copies):
            activities.sort(key=_place)
        trace.warnings += implausible_times(trace, self.clock.read())
        return trace

    def _link(self, origins: dict[int, str]) -> None:
        """Give every activity the key of its call, and say where that was not possible."""
        trace = self.trace
        repeated = self.calls.resolve()
        activities = trace.kernels + trace.copies
        trace.launches, unknown = self.calls.link(activities, origins)
        trace.kernels, trace.copies = activities[: len(trace.kernels)], activities[len(trace.kernels) :]
        for count, what in (
            (self.inexact, "events have a correlation id that is no exact integer"),
            (repeated, "correlation ids stand for several calls of one process"),
            (
                unknown,
                "activities have a correlation id that several processes use; the trace seems merged from theirs",
            ),
        ):
            if count:
                trace.warnings.append(f"{count} {what}: which call launched what they belong to is not known")

    def _kernel(self, event: dict[str, Any]) -> None:
        self.trace.kernels.append(self._activity(event))

    def _copy(self, event: dict[str, Any]) -> None:
        self.trace.copies.append(self._activity(event))

    def _activity(self, event: dict[str, Any]) -> TracedKernel:
        arguments = _arguments(event)
        start, duration = self._times(event)
        device, stream = self._device_and_stream(event, arguments)
        return TracedKernel(self._name(event), device, stream, start, duration, self._correlation(arguments))

    def _device_and_stream(self, event: dict[str, Any], arguments: dict[str, Any]) -> tuple[int, int]:
        origin, pid = process_of(event.get("pid"))
        device = _integer(arguments.get("device"), pid)
        stream = _integer(arguments.get("stream"), event.get("tid"))
        if device is None or stream is None:
            raise self._bad(event, "names no device and stream")
        number = self.devices.number(DeviceKey((origin, device if pid is None else pid), device))
        return number, stream

    def _correlation(self, arguments: dict[str, Any]) -> int | str | None:
        value = arguments.get("correlation")
        if value is None:
            return None
        correlation = identity(value)
        self.inexact += correlation is None
        return correlation

    def _launch(self, event: dict[str, Any]) -> None:
        correlation = self._correlation(_arguments(event))
        if correlation is not None:
            thread = self._thread(event)
            launch = TracedLaunch(self._name(event), thread, *self._times(event))
            self.calls.add(process_of(event.get("pid")), correlation, launch)

    def _range(self, event: dict[str, Any]) -> None:
        self.trace.ranges.append(Range(self._name(event), self._thread(event), *self._times(event)))

    def _module(self, event: dict[str, Any]) -> None:
        name = event.get("name")
        if isinstance(name, str) and name.startswith(MODULE_PREFIX):
            self._range(event)

    def _gpu_range(self, event: dict[str, Any]) -> None:
        where = self._device_and_stream(event, _arguments(event))
        self.trace.gpu_ranges.append(Range(self._name(event), where, *self._times(event)))

    def _name(self, event: dict[str, Any]) -> str:
        name = event.get("name")
        if not isinstance(name, str):
            raise self._bad(event, f"has the name {name!r:.40}, which must be a string")
        known = self.names.get(name)
        if known is None:
            self._spend(event, len(name))
            clean = printable(name[: LONGEST_NAME + 1])
            if len(clean) > LONGEST_NAME:
                clean = clean[: LONGEST_NAME - 1] + "\N{HORIZONTAL ELLIPSIS}"
            known = self.names[name] = sys.intern(clean)
        return known

    def _times(self, event: dict[str, Any]) -> tuple[int, int]:
        """Start and duration in ns; the file has microseconds. Called once for every event that is kept."""
        self.events_left -= 1
        if self.events_left < 0:
            raise TraceError(
                f"{self.trace.path} has more than {MOST_EVENTS} kernels, launching calls and ranges; record fewer steps"
            )
        start, duration = self._number(event, "ts"), self._number(event, "dur")
        if duration < 0:
            raise self._bad(event, f"has dur={duration}; it must not be negative")
        # Whole microseconds apart from the fraction: the product with 1000 of a time since boot is not exact.
        whole = int(start)
        fraction = start - whole
        ns = whole * 1000 + round(fraction * 1000)
        if self.base is None:
            self.base = ns
        self.clock.see(ns, ns - self.base, fraction)
        return ns - self.base, round(duration * 1000)

    def _number(self, event: dict[str, Any], key: str) -> float:
        value = event.get(key)
        if type(value) not in (int, float) or not -LATEST <= value <= LATEST:  # type: ignore[operator]
            raise self._bad(event, f"has {key}={value!r:.40}; it must be a number of microseconds")
        return value  # type: ignore[return-value]

    def _thread(self, event: dict[str, Any]) -> Hashable:
        thread = process_of(event.get("pid")), identity(event.get("tid"))
        known = self.threads.get(thread)
        if known is None:
            self._spend(event, len(repr(thread)))
            known = self.threads[thread] = thread
        return known

    def _spend(self, event: dict[str, Any], characters: int) -> None:
        self.text_left -= characters
        if self.text_left < 0:
            raise self._bad(event, f"brings the names of the trace to more than {MOST_NAMES} characters")

    def _bad(self, event: dict[str, Any], reason: str) -> TraceError:
        kind = str(event.get("cat"))
        return TraceError(f"{self.trace.path}: event {self.trace.events} ({kind}) {reason}")


class _ClockReader:
    """Collects what `TraceClock` says while events come in."""

    def __init__(self) -> None:
        self.first = self.last = self.latest = self.negative = 0
        self.any = self.fractions = False

    def see(self, ns: int, start: int, fraction: float) -> None:
        """A start since the clock's zero and since the trace's first event, and the part of a microsecond in it."""
        if fraction:
            self.fractions = True
        if not self.any:
            self.first = self.last = start
            self.any = True
        elif start < self.first:
            self.first = start
        elif start > self.last:
            self.last = start
        if ns < 0:
            self.negative += 1
        elif ns > self.latest:
            self.latest = ns

    def read(self) -> TraceClock:
        """Times are as fine as a double so large can be, or whole microseconds, each of them rounded."""
        grain = 2 + math.ceil(math.ulp(self.latest / 1000) * 1000) if self.fractions else 1000
        return TraceClock(self.first, self.last, grain, self.negative)


def _arguments(event: dict[str, Any]) -> dict[str, Any]:
    arguments = event.get("args")
    return arguments if isinstance(arguments, dict) else {}


def _integer(*candidates: Any) -> int | None:
    ids = map(identity, candidates)
    return next((value for value in ids if isinstance(value, int)), None)


def _place(one: TracedKernel) -> tuple[int, int, int, int, str, str]:
    """Where an activity stands, whatever the file's order."""
    return one.start, one.device, one.stream, one.duration, one.name, str(one.correlation)


def _moved(item: Range, numbers: dict[int, int]) -> Range:
    where: Any = item.thread
    return item._replace(thread=(numbers[where[0]], where[1]))


def _device(properties: dict[str, Any]) -> TracedDevice:
    def number(key: str) -> int:
        value = identity(properties.get(key))
        return value if isinstance(value, int) else 0

    name = properties.get("name")
    return TracedDevice(
        index=number("id"),
        name=printable(name)[:80] if isinstance(name, str) else "",
        multiprocessors=number("numSms"),
        warp_size=number("warpSize"),
        capability=(number("computeMajor"), number("computeMinor")),
        memory_bytes=number("totalGlobalMem"),
    )
