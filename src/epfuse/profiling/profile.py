"""From a trace to its profile, for each device and one window of steps."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from epfuse.errors import ConfigError, TraceError
from epfuse.hardware import gpus, time_model
from epfuse.profiling.annotations import parse_label
from epfuse.profiling.classify import JOINED_BY, Classifier, Verdicts
from epfuse.profiling.events import Range, Trace, TracedKernel
from epfuse.profiling.experts import ExpertStep, view_experts
from epfuse.profiling.layers import Layers, find_layers
from epfuse.profiling.phases import EXPERT_PHASES, Phase
from epfuse.profiling.read_trace import MODULE_PREFIX
from epfuse.profiling.record import (
    KernelTotal,
    LayerTime,
    LongestPause,
    PhaseTotal,
    Profile,
    TimelineKernel,
    WindowTime,
)
from epfuse.profiling.shapes import ExpertShape
from epfuse.profiling.steps import AUTO, DeviceSteps, TracedStep, choose_steps, find_steps
from epfuse.profiling.timing import busy, length, merge_steps, pauses, streams_of, union

LONGEST_TEXT = 4096
"""Characters of the names of the ranges around a launch, of which rules are tried on."""


@dataclass(frozen=True)
class _Classified:
    step: TracedStep
    verdicts: Verdicts
    layers: Layers


def profile_trace(
    trace: Trace,
    classifier: Classifier,
    *,
    window: str = AUTO,
    shape: ExpertShape | None = None,
    weights: str | None = None,
    tokens: int | None = None,
) -> list[Profile]:
    """Profile every device of a trace.

    Args:
        trace: as read.
        classifier: the rules.
        window: see `choose_steps`.
        shape: the experts; None leaves the expert view out.
        weights: their format in memory, if it is not what kernel names or ``shape`` say.
        tokens: T of a step, if it is not what the annotation says.

    Raises:
        TraceError: the trace has no kernels.
        ConfigError: there is no such window, or nobody says what the weights' format is.
    """
    if not trace.kernels:
        raise TraceError(
            f"{trace.path} has {trace.events} events but no GPU kernel; record it with "
            "activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA] (ROCm too) on a machine with a GPU"
        )
    return [
        _profile_device(trace, found, classifier, window, shape, weights, tokens)
        for found in find_steps(trace).values()
    ]


def _profile_device(
    trace: Trace,
    found: DeviceSteps,
    classifier: Classifier,
    window: str,
    shape: ExpertShape | None,
    weights: str | None,
    tokens: int | None,
) -> Profile:
    chosen = choose_steps(found, window)
    known: dict[Sequences, tuple[Verdicts, Layers]] = {}
    classified = [_classify(step, classifier, trace, known) for step in chosen]
    phases, unclassified = _totals(classified, classifier)
    layers = [layer for part in classified for layer in _layer_times(part)]
    shown = _typical(layers)
    traced = trace.devices[found.device]
    gpu = traced.gpu
    experts = None
    if shape is not None:
        weights, weights_from = _weights_format(weights, classified, classifier, shape)
        experts = view_experts(
            [_expert_step(part, tokens) for part in classified],
            shape,
            weights,
            weights_from,
            gpu.memory_bandwidth if gpu else None,
            time_model.MI300X if gpu is gpus.MI300X else None,  # the one that was fitted to steps of a served model
        )
    return Profile(
        path=trace.path,
        rank=trace.rank,
        device=traced,
        product=gpu.name if gpu else None,
        steps=found,
        window=chosen,
        phases=phases,
        unclassified=unclassified,
        ranges=_range_totals(chosen),
        layers=layers,
        layers_found_by=", ".join(sorted({part.layers.found_by for part in classified})),
        timeline=_timeline(classified, shown),
        timeline_layer=shown,
        time=_window_time(classified, trace, found.device),
        experts=experts,
        kernels_in_trace=sum(len(step.kernels) for step in found.steps) + len(found.outside),
        warnings=trace.warnings,
    )


Sequences = tuple[tuple[str, ...], tuple[int, ...], tuple[str, ...]]
"""Names, streams and enclosing ranges of a step's kernels: steps that agree in them agree in phases and layers."""


def _classify(
    step: TracedStep, classifier: Classifier, trace: Trace, known: dict[Sequences, tuple[Verdicts, Layers]]
) -> _Classified:
    joined: dict[int, str] = {}  # by identity of the tuple: what encloses neighbours is one object
    texts = tuple(
        # a graph's kernels share one launch: what encloses it says nothing about each of them
        "" if _in_graph(kernel, trace) else joined.get(id(around)) or joined.setdefault(id(around), _joined(around))
        for kernel, around in zip(step.kernels, step.ranges, strict=True)
    )
    key = tuple(kernel.name for kernel in step.kernels), tuple(kernel.stream for kernel in step.kernels), texts
    if key not in known:
        verdicts = classifier.by_name(step.kernels, texts)
        layers = find_layers(step.kernels, step.ranges, verdicts.phases)
        classifier.by_context(step.kernels, texts, layers, verdicts)
        known[key] = verdicts, layers
    return _Classified(step, *known[key])


def _joined(around: tuple[Range, ...]) -> str:
    """The ranges' names, outermost first; of a text that is too long the outermost are left out."""
    names: list[str] = []
    room = LONGEST_TEXT
    for item in reversed(around):
        room -= len(item.name) + len(JOINED_BY)
        if room < 0:
            break
        names.append(item.name)
    return JOINED_BY.join(reversed(names))


def _in_graph(kernel: TracedKernel, trace: Trace) -> bool:
    launch = trace.launches.get(kernel.correlation) if kernel.correlation is not None else None
    return launch is not None and launch.is_graph


def _totals(parts: Sequence[_Classified], classifier: Classifier) -> tuple[list[PhaseTotal], list[KernelTotal]]:
    calls: Counter[tuple[Phase | None, str]] = Counter()
    times: Counter[tuple[Phase | None, str]] = Counter()
    origins: dict[tuple[Phase | None, str], set[str]] = defaultdict(set)
    for part in parts:
        for kernel, phase, rule in zip(part.step.kernels, part.verdicts.phases, part.verdicts.rules, strict=True):
            key = phase, kernel.name
            calls[key] += 1
            times[key] += kernel.duration
            if rule is not None:
                origins[key].add(classifier.rules.origins[rule])
    by_phase: dict[Phase | None, list[KernelTotal]] = defaultdict(list)
    for (phase, name), count in calls.items():
        key = phase, name
        by_phase[phase].append(KernelTotal(name, count, times[key], ", ".join(sorted(origins[key])) or None))
    for kernels in by_phase.values():
        kernels.sort(key=lambda kernel: (-kernel.ns, kernel.name))
    phases = [
        PhaseTotal(phase, sum(k.calls for k in by_phase[phase]), sum(k.ns for k in by_phase[phase]), by_phase[phase])
        for phase in Phase
        if phase in by_phase
    ]
    return phases, by_phase.get(None, [])


def _range_totals(steps: Iterable[TracedStep]) -> dict[str, tuple[int, int]]:
    """Named pieces of host code (record_function) and the kernels that they launched; step labels are none of them."""
    calls: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for step in steps:
        for kernel, around in zip(step.kernels, step.ranges, strict=True):
            for name in dict.fromkeys(item.name for item in around):
                calls[name] += 1
                times[name] += kernel.duration
    return {
        name: (calls[name], times[name])
        for name in calls
        if not name.startswith(MODULE_PREFIX) and parse_label(name) is None
    }


def _layer_times(part: _Classified) -> list[LayerTime]:
    kernels, phases = part.step.kernels, part.verdicts.phases
    spans = part.layers.spans
    times = []
    for index, span in enumerate(spans):
        own_end = max(kernels[i].end for i in span)
        end = kernels[spans[index + 1].start].start if index + 1 < len(spans) else own_end
        total: Counter[Phase | None] = Counter()
        for i in span:
            total[phases[i]] += kernels[i].duration
        times.append(LayerTime(part.step.index, index, end - kernels[span.start].start, dict(total)))
    return times


def _typical(layers: Sequence[LayerTime]) -> LayerTime | None:
    """A layer of median duration, of those with experts if there are any."""
    candidates = [layer for layer in layers if Phase.GEMM1 in layer.phases] or layers
    return sorted(candidates, key=lambda layer: layer.span)[(len(candidates) - 1) // 2] if candidates else None


def _timeline(parts: Iterable[_Classified], shown: LayerTime | None) -> list[TimelineKernel]:
    for part in parts:
        if shown is not None and part.step.index == shown.step:
            span, kernels = part.layers.spans[shown.index], part.step.kernels
            origin = kernels[span.start].start
            return [
                TimelineKernel(k.name, part.verdicts.phases[i], k.stream, k.start - origin, k.duration)
                for i, k in ((i, kernels[i]) for i in span)
            ]
    return []


def _window_time(parts: Sequence[_Classified], trace: Trace, device: int) -> WindowTime:
    kernels = [kernel for part in parts for kernel in part.step.kernels]
    copies = [copy for part in parts for copy in part.step.copies]
    spins = [
        kernel
        for part in parts
        for kernel, phase in zip(part.step.kernels, part.verdicts.phases, strict=True)
        if phase is Phase.COLLECTIVES
    ]
    spinning = set(spins)
    all_busy = busy([*kernels, *copies])
    useful = busy([kernel for kernel in kernels if kernel not in spinning] + copies)
    streams = [time for part in parts for time in streams_of(part.step.kernels, part.step.copies, trace.launches)]
    between, longest = _pauses([part.step for part in parts], trace, device)
    return WindowTime(
        span=sum(part.step.span for part in parts),
        busy=all_busy,
        kernel_sum=sum(kernel.duration for kernel in kernels),
        overlap=sum(time.busy for time in streams) - all_busy,
        collectives=length(union((kernel.start, kernel.end) for kernel in spins)),
        exposed_collectives=all_busy - useful,
        copies=len(copies),
        copies_ns=sum(copy.duration for copy in copies),
        streams=merge_steps(streams),
        between=between,
        longest_pause=longest,
    )


def _pauses(steps: Sequence[TracedStep], trace: Trace, device: int) -> tuple[int, LongestPause | None]:
    """The device's idle time between steps that follow one another, and its longest pause, in ns.

    A step begins and ends with an activity: a pause lies in one or in none. What belongs to no step ends pauses too.
    """
    bounds = sorted((step.start, step.end, step.index) for step in steps)
    begin, end = bounds[0][0], max(until for _, until, _ in bounds)
    ran = [a for a in (*trace.kernels, *trace.copies) if a.device == device and a.end >= begin and a.start <= end]
    between, begun = 0, 0
    last = begin, bounds[0][2]  # end and index: of the steps that have begun, of the one that ends last
    longest: LongestPause | None = None
    for pause in pauses(ran):
        while begun < len(bounds) and bounds[begun][0] <= pause.start:
            last = max(last, bounds[begun][1:])
            begun += 1
        inside = pause.start < last[0]
        between += 0 if inside else pause.duration
        if longest is None or pause.duration > longest.ns:
            after_step, in_step = (None, last[1]) if inside else (last[1], None)
            longest = LongestPause(pause.duration, pause.before.name, after_step, in_step)
    return between, longest


def _expert_step(part: _Classified, tokens: int | None) -> ExpertStep:
    times: Counter[Phase] = Counter()
    for kernel, phase in zip(part.step.kernels, part.verdicts.phases, strict=True):
        if phase in EXPERT_PHASES:
            times[phase] += kernel.duration
    phases = part.verdicts.phases
    layers = sum(any(phases[i] is Phase.GEMM1 for i in span) for span in part.layers.spans)
    # without layers, every call of the first GEMM counts as one
    calls = sum(phase is Phase.GEMM1 for phase in phases)
    return ExpertStep(tokens or part.step.label.tokens, layers or calls, dict(times))


def _weights_format(
    given: str | None, parts: Iterable[_Classified], classifier: Classifier, shape: ExpertShape
) -> tuple[str, str]:
    """Format of the expert weights in memory, and who says so."""
    if given:
        return given, "the command line"
    named = {
        classifier.rules.rules[rule].weights for part in parts for rule in part.verdicts.rules if rule is not None
    } - {None}
    if len(named) == 1:
        return str(named.pop()), "the kernels' names"
    if shape.weights:
        return shape.weights, shape.weights_from
    raise ConfigError(f"the format of {shape.name}'s expert weights is not known; it needs --weights")
