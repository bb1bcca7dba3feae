"""Kineto's Chrome traces, from CUDA and from ROCm, into a `Trace`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from epfuse.errors import TraceError
from epfuse.profiling.events import Kernel, Launch, Range, Trace, TracedDevice
from epfuse.profiling.json_stream import Progress, stream_events

LONGEST_NAME = 4096
"""Characters of a name that are kept; C++ template names reach a few thousand."""

LATEST = 1e17
"""Microseconds (3000 years): more is no time, and neither are infinity and NaN, which Python's JSON reads."""

MODULE_PREFIX = "nn.Module: "
"""Python functions with this prefix are modules' forwards (profiles with stacks); all others are dropped."""

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def read_trace(path: Path, progress: Progress | None = None) -> Trace:
    """Read one trace file, plain or gzipped, whatever the order of its events.

    Args:
        path: the file.
        progress: see `stream_events`.

    Raises:
        TraceError: the file can't be read, is no trace, is cut short, or an event has no usable time.
    """
    builder = _Builder(path)
    for event in stream_events(path, builder.on_value, progress):
        builder.on_event(event)
    return builder.finish()


class _Builder:
    def __init__(self, path: Path) -> None:
        self.trace = Trace(path=str(path))
        self.base: float | None = None
        self.names: dict[str, str] = {}
        self.threads: dict[Hashable, Hashable] = {}  # one object a thread, not one a launch
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
        if key == "deviceProperties" and isinstance(value, list):
            for properties in value:
                if isinstance(properties, dict):
                    device = _device(properties)
                    self.trace.devices[device.index] = device
        elif key == "distributedInfo" and isinstance(value, dict):
            rank = value.get("rank")
            self.trace.rank = rank if isinstance(rank, int) else None

    def on_event(self, event: dict[str, Any]) -> None:
        self.trace.events += 1
        category = event.get("cat")
        if event.get("ph") == "X" and isinstance(category, str) and category in self.handlers:
            self.handlers[category](event)

    def finish(self) -> Trace:
        trace = self.trace
        trace.kernels.sort(key=lambda kernel: (kernel.start, kernel.stream))
        trace.copies.sort(key=lambda copy: (copy.start, copy.stream))
        return trace

    def _kernel(self, event: dict[str, Any]) -> None:
        self.trace.kernels.append(self._activity(event))

    def _copy(self, event: dict[str, Any]) -> None:
        self.trace.copies.append(self._activity(event))

    def _activity(self, event: dict[str, Any]) -> Kernel:
        arguments = _arguments(event)
        start, duration = self._times(event)
        device = _integer(arguments.get("device"), event.get("pid"))
        stream = _integer(arguments.get("stream"), event.get("tid"))
        if device is None or stream is None:
            raise self._bad(event, "names no device and stream")
        correlation = arguments.get("correlation")
        return Kernel(
            self._name(event), device, stream, start, duration, correlation if isinstance(correlation, int) else None
        )

    def _launch(self, event: dict[str, Any]) -> None:
        correlation = _arguments(event).get("correlation")
        if isinstance(correlation, int):
            self.trace.launches[correlation] = Launch(self._name(event), self._thread(event), *self._times(event))

    def _range(self, event: dict[str, Any]) -> None:
        self.trace.ranges.append(Range(self._name(event), self._thread(event), *self._times(event)))

    def _module(self, event: dict[str, Any]) -> None:
        if str(event.get("name")).startswith(MODULE_PREFIX):
            self._range(event)

    def _gpu_range(self, event: dict[str, Any]) -> None:
        arguments = _arguments(event)
        device = _integer(arguments.get("device"), event.get("pid"))
        stream = _integer(arguments.get("stream"), event.get("tid"))
        self.trace.gpu_ranges.append(Range(self._name(event), (device, stream), *self._times(event)))

    def _name(self, event: dict[str, Any]) -> str:
        name = event.get("name")
        if not isinstance(name, str):
            raise self._bad(event, f"has the name {name!r:.40}, which must be a string")
        known = self.names.get(name)
        if known is None:
            clean = UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", name)
            if len(clean) > LONGEST_NAME:
                clean = clean[: LONGEST_NAME - 1] + "\N{HORIZONTAL ELLIPSIS}"
            known = self.names[name] = sys.intern(clean)
        return known

    def _times(self, event: dict[str, Any]) -> tuple[int, int]:
        """Start and duration in ns; the file has microseconds."""
        start, duration = self._number(event, "ts"), self._number(event, "dur")
        if duration < 0:
            raise self._bad(event, f"has dur={duration}; it must not be negative")
        if self.base is None:
            self.base = start
        # The difference of two nearby floats is exact, the product with 1000 of a time since boot is not.
        return round((start - self.base) * 1000), round(duration * 1000)

    def _number(self, event: dict[str, Any], key: str) -> float:
        value = event.get(key)
        if type(value) not in (int, float) or not -LATEST <= value <= LATEST:  # type: ignore[operator]
            raise self._bad(event, f"has {key}={value!r:.40}; it must be a number of microseconds")
        return value  # type: ignore[return-value]

    def _thread(self, event: dict[str, Any]) -> Hashable:
        thread = str(event.get("pid")), str(event.get("tid"))
        return self.threads.setdefault(thread, thread)

    def _bad(self, event: dict[str, Any], reason: str) -> TraceError:
        kind = str(event.get("cat"))
        return TraceError(f"{self.trace.path}: event {self.trace.events} ({kind}) {reason}")


def _arguments(event: dict[str, Any]) -> dict[str, Any]:
    arguments = event.get("args")
    return arguments if isinstance(arguments, dict) else {}


def _integer(*candidates: Any) -> int | None:
    return next((value for value in candidates if type(value) is int), None)


def _device(properties: dict[str, Any]) -> TracedDevice:
    def number(key: str) -> int:
        value = properties.get(key)
        return value if type(value) is int else 0

    name = properties.get("name")
    return TracedDevice(
        index=number("id"),
        name=UNPRINTABLE.sub("", name)[:80] if isinstance(name, str) else "",
        multiprocessors=number("numSms"),
        warp_size=number("warpSize"),
        capability=(number("computeMajor"), number("computeMinor")),
        memory_bytes=number("totalGlobalMem"),
    )
