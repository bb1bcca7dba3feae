"""Profiles as one HTML page, and a layer's timeline as a picture of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from epfuse.profiling.compare import compare
from epfuse.profiling.names import short_name
from epfuse.profiling.phases import Phase
from epfuse.profiling.record import Profile
from epfuse.profiling.sentences import (
    describe_device,
    describe_experts,
    describe_layers,
    describe_prediction,
    describe_time,
    describe_window,
    ms,
)
from epfuse.profiling.timeline import Timeline, draw_timeline
from epfuse.report.charts import Chart, stacked_bars
from epfuse.report.page import render

UNCLASSIFIED = "unclassified"
CLASSES = {phase: f"p{index}" for index, phase in enumerate(Phase)} | {None: "pu"}
"""Phase -> its CSS class, which is its colour."""

BAR_WIDTH = 1000


@dataclass(frozen=True)
class PhasePart:
    """A phase in a horizontal bar: pixels from the left, and what the pointer shows."""

    css: str
    x: float
    width: float
    title: str


@dataclass(frozen=True)
class PhaseBar:
    """One profile's phases side by side, as long as its kernel time a step."""

    label: str
    parts: list[PhasePart]


@dataclass(frozen=True)
class Section:
    """What the page shows of one profile."""

    profile: Profile
    device: str
    window: str
    lines: list[str]
    experts: list[str]
    predictions: list[str]
    timeline: Timeline | None
    timeline_title: str
    layers: Chart | None
    layer_classes: list[str]


def profile_page(profiles: Sequence[Profile], comparison: bool) -> str:
    """A self-contained page.

    Args:
        profiles: at least one.
        comparison: whether to put the first two side by side.
    """
    return render(
        "profile.html.j2",
        sections=[_section(profile) for profile in profiles],
        bars=_bars(profiles),
        bar_width=BAR_WIDTH,
        rows=compare(profiles[0], profiles[1]) if comparison else [],
        legend=[(CLASSES[phase], phase.value) for phase in Phase if _has(profiles, phase)]
        + ([(CLASSES[None], UNCLASSIFIED)] if any(profile.unclassified for profile in profiles) else []),
        classes=CLASSES,
        short_name=short_name,
        ms=ms,
    )


def timeline_svg(profile: Profile) -> str:
    """The picture of one layer with its legend, as an SVG file; the profile must have layers."""
    section = _section(profile)
    return render(
        "profile_timeline.svg.j2",
        timeline=section.timeline,
        title=section.timeline_title,
        legend=[
            (CLASSES[phase], phase.value if phase else UNCLASSIFIED)
            for phase in [*Phase, None]
            if any(kernel.phase is phase for kernel in profile.timeline)
        ],
        classes=CLASSES,
    )


def _has(profiles: Sequence[Profile], phase: Phase) -> bool:
    return any(total.phase is phase for profile in profiles for total in profile.phases)


def _bars(profiles: Sequence[Profile]) -> list[PhaseBar]:
    longest = max(profile.time.kernel_sum / len(profile.window) for profile in profiles) or 1
    bars = []
    for profile in profiles:
        steps = len(profile.window)
        totals = [(CLASSES[total.phase], total.phase.value, total.ns) for total in profile.phases]
        if profile.unclassified:
            totals.append((CLASSES[None], UNCLASSIFIED, sum(kernel.ns for kernel in profile.unclassified)))
        parts, x = [], 0.0
        for css, name, ns in totals:
            width = BAR_WIDTH * ns / steps / longest
            share = 100 * ns / profile.time.kernel_sum if profile.time.kernel_sum else 0.0
            parts.append(PhasePart(css, x, width, f"{name}: {ms(ns / steps)} ms a step, {share:.1f} %"))
            x += width
        label = f"{profile.path}, device {profile.device.index}: {ms(profile.time.kernel_sum / steps)} ms a step"
        bars.append(PhaseBar(label, parts))
    return bars


def _section(profile: Profile) -> Section:
    shown = profile.timeline_layer
    title = ""
    if shown is not None:
        title = f"Layer {shown.index} of step {shown.step}, {shown.span / 1e3:.1f} us: a layer of median duration"
    timeline = draw_timeline(profile.timeline) if profile.timeline else None
    if timeline is not None and timeline.widened:
        title += f"; {timeline.widened} of its {len(timeline.boxes)} kernels are drawn wider than they ran, to be seen"
    experts = profile.experts
    chart, classes = _layer_chart(profile)
    return Section(
        profile=profile,
        device=describe_device(profile),
        window=describe_window(profile),
        lines=[describe_layers(profile), *describe_time(profile)],
        experts=describe_experts(experts) if experts else [],
        predictions=[describe_prediction(experts, p) for p in experts.predictions] if experts else [],
        timeline=timeline,
        timeline_title=title,
        layers=chart,
        layer_classes=classes,
    )


def _layer_chart(profile: Profile) -> tuple[Chart | None, list[str]]:
    """Kernel time of each layer, stacked by phase (mean over the steps of the window), and the series' colours."""
    if not profile.layers:
        return None, []
    count = max(layer.index for layer in profile.layers) + 1
    series: dict[str, list[float]] = {}
    classes = []
    tops = [0.0] * count
    for phase in [*Phase, None]:
        values = [0.0] * count
        for layer in profile.layers:
            values[layer.index] += layer.phases.get(phase, 0) / 1e3 / len(profile.window)
        if any(values):
            series[phase.value if phase else UNCLASSIFIED] = [round(value, 1) for value in values]
            classes.append(CLASSES[phase])
            tops = [top + value for top, value in zip(tops, values, strict=True)]
    return (
        stacked_bars("Kernel time of each layer, us", [str(index) for index in range(count)], series, max(tops)),
        classes,
    )
