"""Time calls: in CUDA or HIP graphs on a GPU, one after another on a CPU."""

from __future__ import annotations

import enum
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import ConfigDict

from epfuse.arguments import checks_enums
from epfuse.bench.amounts import Amount, Positive, Size, Text

Call = Callable[[], torch.Tensor]

MOST_CALLS = 400
"""Calls in one graph: more make it slow to capture and no more exact."""


class TimingMethod(enum.Enum):
    """How calls were run."""

    GRAPH = "graph"
    """Captured back to back into one CUDA or HIP graph that is replayed; the host takes no part."""
    PLAIN = "plain"
    """Called from Python; on a GPU the time between two events, launches by the host included."""


@dataclass(frozen=True)
class Sampling:
    """How much is measured.

    Attributes:
        samples: measurements of each row.
        seconds: that one measurement should take at least, by repeating the calls.
    """

    samples: int
    seconds: float


THOROUGH = Sampling(samples=15, seconds=0.02)
QUICK = Sampling(samples=5, seconds=0.005)


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call.

    Attributes:
        median_us, q1_us, q3_us, min_us, max_us: over the samples; q1 and q3 are the quartiles.
        samples: how many.
        calls: in each sample, which is their mean.
        method: `TimingMethod`'s value.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    median_us: Positive
    q1_us: Amount
    q3_us: Positive
    min_us: Amount
    max_us: Positive
    samples: Size
    calls: Size
    method: Text

    @classmethod
    @checks_enums
    def of(cls, seconds: Sequence[float], calls: int, method: TimingMethod) -> Timing:
        """Statistics of samples, each the seconds of ``calls`` calls."""
        each = sorted(1e6 * sample / calls for sample in seconds)
        # quantiles() needs two; "inclusive" makes the samples the whole population, so quartiles lie between them
        q1, median, q3 = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
        return cls(median, q1, q3, each[0], each[-1], len(each), calls, method.value)

    @property
    def spread_us(self) -> float:
        """The interquartile range."""
        return self.q3_us - self.q1_us


@dataclass(frozen=True)
class Measured:
    """A timing, and the results of the last of the timed calls, one for each of the calls in turn."""

    timing: Timing
    outputs: list[torch.Tensor]


@dataclass(frozen=True)
class Round:
    """Something that runs all calls in turn, several times, and where it leaves their results.

    Attributes:
        run: does it.
        outputs: the last results, one for each call.
    """

    run: Callable[[], None]
    outputs: Callable[[], list[torch.Tensor]]


@checks_enums
def time_calls(calls: Sequence[Call], device: torch.device, sampling: Sampling, method: TimingMethod) -> Measured:
    """Time ``calls``, run in turn: the time of one is the mean over them.

    Args:
        calls: each has been called before, so that nothing is compiled here. In turn they should read more than the
            device's caches hold.
        device: a CPU takes Method.PLAIN.
        sampling: how much.
        method: GRAPH needs calls without host syncs.

    Raises:
        RuntimeError: a call can't be captured.
    """
    make = captured if method is TimingMethod.GRAPH else looped
    once = make(calls, 1, device)
    once.run()
    estimate = statistics.median(elapsed(once.run, device) for _ in range(3))
    most = max(1, MOST_CALLS // len(calls))
    repeats = max(1, min(most, round(sampling.seconds / max(estimate, 1e-9))))
    many = make(calls, repeats, device) if repeats > 1 else once
    many.run()  # the first replay of a graph uploads it
    seconds = [elapsed(many.run, device) for _ in range(sampling.samples)]
    timing = Timing.of(seconds, repeats * len(calls), method)
    for output in many.outputs():
        if output.is_floating_point():
            output.fill_(torch.nan)
    many.run()  # once more into poisoned memory: whoever checks the results sees what the timed calls write
    return Measured(timing, many.outputs())


def looped(calls: Sequence[Call], repeats: int, device: torch.device) -> Round:
    """``calls`` in turn, ``repeats`` times, from Python."""
    outputs: list[torch.Tensor] = []

    def run() -> None:
        for _ in range(repeats):
            outputs[:] = [call() for call in calls]

    return Round(run, lambda: outputs)


def captured(calls: Sequence[Call], repeats: int, device: torch.device, error_mode: str = "global") -> Round:
    """``calls`` in turn, ``repeats`` times, as one graph.

    Args:
        calls: each has been called before.
        repeats: of all of them.
        device: a GPU.
        error_mode: of `torch.cuda.graph`: whether other threads may ask the driver meanwhile.
    """
    # torch.cuda is HIP on ROCm
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:  # workspaces that libraries keep for each stream are made here, not in the graph
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    outputs: list[torch.Tensor] = []
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=error_mode):
        for _ in range(repeats):
            # the last round's results are kept, so no later allocation of the graph gets their memory
            outputs[:] = [call() for call in calls]
    return Round(graph.replay, lambda: outputs)


def elapsed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of one run."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    stream = torch.cuda.current_stream(device)
    begin.record(stream)
    run()
    end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3
