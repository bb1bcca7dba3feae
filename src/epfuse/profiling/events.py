"""What is kept of a trace: GPU activities, the calls that launched them, named ranges, and the devices.

Times are integer nanoseconds since the trace's first event. Sums of phases, streams and gaps are then exact, which
floating-point microseconds since boot are not (their last bit is a nanosecond).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from epfuse.hardware.gpus import GPU, named, seen_by_rocm


class TracedKernel(NamedTuple):
    """One kernel, copy or memset on a GPU.

    Attributes:
        name: as the profiler reports it; control characters are replaced.
        device: number of the GPU, a key of `Trace.devices`.
        stream: the queue that it ran in.
        start: ns.
        duration: ns.
        correlation: key of the call that launched it, shared by all kernels of a graph; None if the trace has none.
    """

    name: str
    device: int
    stream: int
    start: int
    duration: int
    correlation: Hashable

    @property
    def end(self) -> int:
        """In ns."""
        return self.start + self.duration


class TracedLaunch(NamedTuple):
    """A runtime or driver call on the host; ns."""

    name: str
    thread: Hashable
    start: int
    duration: int

    @property
    def end(self) -> int:
        """In ns."""
        return self.start + self.duration

    @property
    def is_graph(self) -> bool:
        """Whether one call launches many kernels: then its host position says nothing about a single kernel."""
        return "GraphLaunch" in self.name


class Range(NamedTuple):
    """A named piece of the host's time (record_function, a module's forward), or of a GPU's; ns.

    ``thread`` is the host thread, or the (device, stream) of a range on the GPU's timeline.
    """

    name: str
    thread: Hashable
    start: int
    duration: int

    @property
    def end(self) -> int:
        """In ns."""
        return self.start + self.duration


@dataclass(frozen=True)
class TracedDevice:
    """What a trace says of a GPU; zero and empty where it says nothing (ROCm leaves the name out).

    ``owner`` tells GPUs of one index apart: a rank's name or a process, in a trace that was merged from several.
    """

    index: int
    name: str = ""
    multiprocessors: int = 0
    warp_size: int = 0
    capability: tuple[int, int] = (0, 0)
    memory_bytes: int = 0
    owner: str = ""

    @property
    def gpu(self) -> GPU | None:
        """Which product it is, by name or, where the trace has none, by its sizes; None if it is not known."""
        if self.name:
            return named(self.name)
        return seen_by_rocm(self.capability, self.multiprocessors, self.memory_bytes)


@dataclass
class Trace:
    """One trace file.

    Attributes:
        path: for messages.
        kernels: in order of start.
        copies: memcpy and memset activities, in order of start.
        launches: a kernel's ``correlation`` -> the host call.
        ranges: on the host.
        gpu_ranges: on the GPUs' timelines.
        devices: by number, which is the index where no two GPUs share it.
        rank: of a distributed run.
        events: how many events the file has, of any kind.
        warnings: what can't be right in it, and what follows for the profile; a sentence each.
    """

    path: str
    kernels: list[TracedKernel] = field(default_factory=list)
    copies: list[TracedKernel] = field(default_factory=list)
    launches: dict[Hashable, TracedLaunch] = field(default_factory=dict)
    ranges: list[Range] = field(default_factory=list)
    gpu_ranges: list[Range] = field(default_factory=list)
    devices: dict[int, TracedDevice] = field(default_factory=dict)
    rank: int | None = None
    events: int = 0
    warnings: list[str] = field(default_factory=list)
