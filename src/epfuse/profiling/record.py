"""What a profile says: one device of one trace, and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from epfuse.profiling.events import TracedDevice
from epfuse.profiling.experts import ExpertView
from epfuse.profiling.phases import Phase
from epfuse.profiling.steps import DeviceSteps, TracedStep
from epfuse.profiling.timing import Gaps, StreamTime, percentile


@dataclass(frozen=True)
class KernelTotal:
    """All calls of one kernel in the window, in ns. ``rule`` names the rules file that classified it, if one did."""

    name: str
    calls: int
    ns: int
    rule: str | None


@dataclass(frozen=True)
class PhaseTotal:
    """A phase in the window; kernels with the most time first; ns."""

    phase: Phase
    calls: int
    ns: int
    kernels: list[KernelTotal]


@dataclass(frozen=True)
class LayerTime:
    """One layer of one step.

    Attributes:
        step: index of the step.
        index: of the layer in it.
        span: from its first kernel's start to the next layer's, or to its own end if it is the last; ns.
        phases: kernel time by phase; None stands for what is unclassified.
    """

    step: int
    index: int
    span: int
    phases: dict[Phase | None, int]


@dataclass(frozen=True)
class TimelineKernel:
    """A kernel of the layer that the timeline shows; ``start`` is in ns from the layer's first kernel."""

    name: str
    phase: Phase | None
    stream: int
    start: int
    duration: int


@dataclass(frozen=True)
class LongestPause:
    """The longest time in which the device runs nothing, from the window's begin to its end.

    Attributes:
        ns: how long.
        before: name of the kernel, copy or memset that ends it.
        after_step: it lies between this step of the window and the next one; None if it lies in a step.
        in_step: the step that it lies in; None if it lies between two.
    """

    ns: int
    before: str
    after_step: int | None
    in_step: int | None


@dataclass(frozen=True)
class WindowTime:
    """Where the window's wall time went; ns, summed over its steps.

    Attributes:
        span: from first to last activity of each step.
        busy: at least one stream runs something.
        kernel_sum: sum over all kernels.
        overlap: what streams did at the same time: the streams' busy times minus ``busy``.
        collectives: at least one collective runs. It spins while it waits: busy, but not all of it work.
        exposed_collectives: only collectives run.
        copies: number of memcpy and memset.
        copies_ns: sum over them.
        streams: one by one.
        between: the device runs nothing and no step of the window is under way: no part of ``span``.
        longest_pause: in a step or between two; None if something runs all the time.
    """

    span: int
    busy: int
    kernel_sum: int
    overlap: int
    collectives: int
    exposed_collectives: int
    copies: int
    copies_ns: int
    streams: list[StreamTime]
    between: int
    longest_pause: LongestPause | None


@dataclass(frozen=True)
class Profile:
    """One device of one trace.

    Attributes:
        path: of the trace.
        rank: of a distributed run, if the trace says.
        device: what the trace says of it.
        product: its name as vendors call it, if recognised.
        steps: all of the device's steps.
        window: indices of the steps that are profiled.
        phases: those that have kernels, in the order of a step.
        unclassified: kernels without a phase, those with the most time first.
        ranges: record_function name -> kernels and ns launched in it.
        layers: of all steps of the window.
        layers_found_by: ``modules``, ``repetition``, ``nothing``, or several, joined by a comma.
        timeline: the kernels of a layer of median duration, one with experts if there are any.
        timeline_layer: which one.
        time: where the wall time went.
        experts: None without a shape or without expert GEMMs.
        kernels_in_trace: of the device, in and out of the window.
        warnings: what can't be right in the trace; a sentence each.
    """

    path: str
    rank: int | None
    device: TracedDevice
    product: str | None
    steps: DeviceSteps
    window: list[TracedStep]
    phases: list[PhaseTotal]
    unclassified: list[KernelTotal]
    ranges: dict[str, tuple[int, int]]
    layers: list[LayerTime]
    layers_found_by: str
    timeline: list[TimelineKernel]
    timeline_layer: LayerTime | None
    time: WindowTime
    experts: ExpertView | None
    kernels_in_trace: int
    warnings: list[str]

    @property
    def kernels_total(self) -> int:
        """Kernels of the window, with a phase or unclassified."""
        return sum(len(step.kernels) for step in self.window)

    @property
    def coverage(self) -> float:
        """Share of the kernel time that has a phase."""
        return sum(phase.ns for phase in self.phases) / self.time.kernel_sum if self.time.kernel_sum else 0.0

    def layer_span(self, share: float) -> float | None:
        """Percentile of the layers' spans, ns; None without layers."""
        return percentile([layer.span for layer in self.layers], share) if self.layers else None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values; times in microseconds."""
        return {
            "trace": self.path,
            "rank": self.rank,
            "warnings": self.warnings,
            "device": asdict(self.device) | {"product": self.product},
            "steps": [
                {
                    "index": step.index,
                    "label": step.label.text,
                    "kind": step.label.kind.value,
                    "requests": step.label.requests,
                    "tokens": step.label.tokens,
                    "kernels": len(step.kernels),
                    "span_us": us(step.span),
                }
                for step in self.steps.steps
            ],
            "steps_found_by": self.steps.found_by,
            "window": [step.index for step in self.window],
            "kernels_total": self.kernels_total,
            "kernels_in_trace": self.kernels_in_trace,
            "outside_steps": {
                "kernels": len(self.steps.outside),
                "us": us(sum(kernel.duration for kernel in self.steps.outside)),
            },
            "coverage": self.coverage,
            "phases": [
                {
                    "name": phase.phase.value,
                    "calls": phase.calls,
                    "us": us(phase.ns),
                    "share": phase.ns / self.time.kernel_sum if self.time.kernel_sum else 0.0,
                    "kernels": [_kernel_json(kernel) for kernel in phase.kernels],
                }
                for phase in self.phases
            ],
            "unclassified": [_kernel_json(kernel) for kernel in self.unclassified],
            "ranges": [{"name": n, "kernels": calls, "us": us(ns)} for n, (calls, ns) in self.ranges.items()],
            "layers": {
                "count": len(self.layers),
                "found_by": self.layers_found_by,
                "p50_us": _us_or_none(self.layer_span(0.50)),
                "p95_us": _us_or_none(self.layer_span(0.95)),
                "spans_us": [us(layer.span) for layer in self.layers],
            },
            "time": _time_json(self.time),
            "experts": _experts_json(self.experts) if self.experts else None,
        }


def us(ns: float) -> float:
    """Nanoseconds as microseconds, to the nanosecond."""
    return round(ns) / 1000


def _us_or_none(ns: float | None) -> float | None:
    return None if ns is None else us(ns)


def _kernel_json(kernel: KernelTotal) -> dict[str, Any]:
    return {"name": kernel.name, "calls": kernel.calls, "us": us(kernel.ns), "rule": kernel.rule}


def _gaps_json(gaps: Gaps) -> dict[str, float]:
    return {
        "host_late_us": us(gaps.host_late),
        "launch_us": us(gaps.launch),
        "device_us": us(gaps.device),
        "unknown_us": us(gaps.unknown),
    }


def _pause_json(pause: LongestPause) -> dict[str, Any]:
    return {"us": us(pause.ns), "before": pause.before, "after_step": pause.after_step, "in_step": pause.in_step}


def _time_json(time: WindowTime) -> dict[str, Any]:
    return {
        "span_us": us(time.span),
        "busy_us": us(time.busy),
        "idle_us": us(time.span - time.busy),
        "between_steps_us": us(time.between),
        "longest_pause": _pause_json(time.longest_pause) if time.longest_pause else None,
        "kernel_sum_us": us(time.kernel_sum),
        "overlap_us": us(time.overlap),
        "collectives_us": us(time.collectives),
        "exposed_collectives_us": us(time.exposed_collectives),
        "collectives_are": "spin time: busy while waiting for other ranks",
        "copies": time.copies,
        "copies_us": us(time.copies_ns),
        "streams": [
            {"stream": s.stream, "kernels": s.kernels, "busy_us": us(s.busy), "gaps": _gaps_json(s.gaps)}
            for s in time.streams
        ],
    }


def _experts_json(view: ExpertView) -> dict[str, Any]:
    return {
        "shape": asdict(view.shape.layer) | {"name": view.shape.name},
        "weights": view.weights,
        "weights_from": view.weights_from,
        "tokens": view.tokens,
        "active_experts": view.active_experts,
        "us": us(view.ns),
        "gemms": [
            {
                "name": gemm.phase.value,
                "us": us(gemm.ns),
                "bytes": round(gemm.bytes),
                "tb_per_s": gemm.rate / 1e12,
                "fraction_of_peak": gemm.fraction,
            }
            for gemm in view.gemms
        ],
        "predicted": [
            {"path": p.path, "us": us(p.ns), "saved_us": us(p.saved), "kind": "predicted"} for p in view.predictions
        ],
        "predicted_for": view.machine.name if view.machine else None,
    }
