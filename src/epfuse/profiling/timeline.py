"""One layer's kernels on a time axis, a lane a stream: data with coordinates for the page's SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from epfuse.profiling.names import short_name
from epfuse.profiling.phases import Phase
from epfuse.profiling.record import TimelineKernel
from epfuse.report.charts import Tick, linear_ticks

WIDTH = 1032
LANE = 54  # height of a stream's lane, and the room to the next one
BAR = 34
LEFT = 8
TOP = 20  # room for the lanes' names
AXIS = 30  # below the last lane
PIXELS_A_CHARACTER = 6.6
HAIR = 0.8  # width of a kernel that is too short to be seen


@dataclass(frozen=True)
class Box:
    """A kernel.

    Attributes:
        x, y, width: pixels; all have the height ``BAR``.
        phase: its colour.
        label: what fits into it; empty if nothing does.
        title: shown by the browser when the pointer rests on it.
    """

    x: float
    y: float
    width: float
    phase: Phase | None
    label: str
    title: str


@dataclass(frozen=True)
class Timeline:
    """The picture.

    Attributes:
        boxes: the kernels.
        lanes: the streams' names and where they stand.
        ticks: microseconds since the layer's first kernel.
        height: pixels.
        widened: how many kernels are drawn wider than they ran, to be seen.
    """

    boxes: list[Box]
    lanes: list[Tick]
    ticks: list[Tick]
    height: int
    widened: int = 0
    width: int = WIDTH
    left: int = LEFT
    bar: int = BAR

    @property
    def axis(self) -> int:
        """Its y."""
        return self.height - AXIS


def draw_timeline(kernels: Sequence[TimelineKernel]) -> Timeline:
    """The timeline of one layer; at least one kernel."""
    streams = {stream: lane for lane, stream in enumerate(sorted({kernel.stream for kernel in kernels}))}
    span = max(kernel.start + kernel.duration for kernel in kernels) or 1
    scale = (WIDTH - 2 * LEFT) / span
    height = TOP + LANE * len(streams) + AXIS
    boxes = []
    for kernel in kernels:
        width = max(kernel.duration * scale, HAIR)
        top = TOP + LANE * streams[kernel.stream]
        name = kernel.phase.value if kernel.phase else "unclassified"
        title = f"{name}: {kernel.duration / 1e3:.1f} us at {kernel.start / 1e3:.1f} us: {short_name(kernel.name, 120)}"
        label = name if len(name) * PIXELS_A_CHARACTER < width else ""
        boxes.append(Box(LEFT + kernel.start * scale, top, width, kernel.phase, label, title))
    lanes = [Tick(TOP + LANE * lane - 6, f"stream {stream}") for stream, lane in streams.items()]
    ticks = [
        Tick(LEFT + value * 1e3 * scale, f"{value:g} us") for value in linear_ticks(span / 1e3) if value * 1e3 <= span
    ]
    widened = sum(kernel.duration * scale < HAIR for kernel in kernels)
    return Timeline(boxes, lanes, ticks, height, widened)
