"""Profiles as tables on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from epfuse.profiling.compare import compare
from epfuse.profiling.names import short_name
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
from epfuse.report.terminal import figures, make_table

NUMBERS_WIDTH = 60
"""Columns of the phase table that come before the kernels' names."""


def print_profile(profile: Profile, console: Console) -> None:
    """What was profiled, a row a phase, what is unclassified, time, layers, experts."""
    _line(console, profile.path)
    _line(console, f"{describe_device(profile)}; {describe_window(profile)}")
    for step in profile.window[:1]:
        if step.label.text:
            _line(console, step.label.text)
    for warning in profile.warnings:
        _line(console, f"warning: {warning}")
    console.print(_phase_table(profile, console.width))
    _line(console, f"{100 * profile.coverage:.1f} % of the kernel time has a phase")
    for kernel in profile.unclassified:
        _line(console, f"unclassified: {kernel.calls} x, {kernel.ns / 1e3:.1f} us: {kernel.name}")
    for line in describe_time(profile):
        _line(console, line)
    _line(console, describe_layers(profile))
    for name, (kernels, ns) in profile.ranges.items():
        _line(console, f"range {name}: {kernels} kernels, {ms(ns)} ms")
    if profile.experts:
        console.print()
        for line in describe_experts(profile.experts):
            _line(console, line)
        for prediction in profile.experts.predictions:
            _line(console, describe_prediction(profile.experts, prediction))
        if not profile.experts.predictions:
            _line(
                console, "nothing predicted: the time model does not know this device, or the steps' tokens (--tokens)"
            )


def print_comparison(a: Profile, b: Profile, console: Console) -> None:
    """Both profiles' phases beside each other, microseconds a step."""
    for letter, profile in (("A", a), ("B", b)):
        _line(console, f"{letter}: {profile.path}; {describe_device(profile)}; {describe_window(profile)}")
        for warning in profile.warnings:
            _line(console, f"warning: {letter}: {warning}")
    names = ("A calls", "B calls", "A us", "B us", "B - A us", "B / A")
    table = make_table("phase, a step", *map(figures, names))
    for row in compare(a, b):
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        times = (f"{row.ns[0] / 1e3:.1f}", f"{row.ns[1] / 1e3:.1f}", f"{row.difference / 1e3:+.1f}")
        table.add_row(row.name, f"{row.calls[0]:g}", f"{row.calls[1]:g}", *times, ratio)
    console.print(table)


def _phase_table(profile: Profile, width: int) -> Table:
    total = profile.time.kernel_sum or 1
    whole = Column("most of it", no_wrap=True)  # shortened below, where its middle can go
    phase = Column("phase", no_wrap=True)
    table = make_table(phase, *map(figures, ("calls", "us", "%", "us a call")), whole)
    room = max(width - NUMBERS_WIDTH, 12)
    rows = [(phase.phase.value, phase.calls, phase.ns, phase.kernels[0].name) for phase in profile.phases]
    if profile.unclassified:
        calls = sum(kernel.calls for kernel in profile.unclassified)
        ns = sum(kernel.ns for kernel in profile.unclassified)
        rows.append(("unclassified", calls, ns, profile.unclassified[0].name))
    for name, calls, ns, kernel in rows:
        each = f"{ns / calls / 1e3:.1f}"
        table.add_row(
            name, str(calls), f"{ns / 1e3:.1f}", f"{100 * ns / total:.1f}", each, Text(short_name(kernel, room))
        )
    table.add_section()
    table.add_row("all kernels", str(profile.kernels_total), f"{profile.time.kernel_sum / 1e3:.1f}", "100.0", "", "")
    return table


def _line(console: Console, text: str) -> None:
    """Text from a file is no markup, and is folded nowhere, so that it can be searched."""
    console.print(Text(text), soft_wrap=True, highlight=False)
