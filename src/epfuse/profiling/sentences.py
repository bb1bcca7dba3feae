"""What a profile says in words: the same sentences on the terminal and in the page."""

from __future__ import annotations

from epfuse.profiling.experts import ExpertView, PathPrediction
from epfuse.profiling.names import short_name
from epfuse.profiling.record import Profile

PATH_TEXT = {
    "bf16": "BF16, by epfuse",
    "w8a16": "w8a16 (MXFP8 weights, BF16 activations)",
    "w8a8": "w8a8 (MXFP8 weights and activations)",
    "seed-1782": "BF16, fused as in InferenceX PR 1782",
}


def ms(ns: float) -> str:
    """Nanoseconds as milliseconds with three significant decimals."""
    return f"{ns / 1e6:.3f}"


def describe_device(profile: Profile) -> str:
    """Device and, if there are several ranks, which one."""
    device = profile.device
    name = profile.product or device.name or "a GPU that is not known"
    where = f"device {device.index}" + (f" of {device.owner}" if device.owner else "")
    where += "" if profile.rank is None else f", rank {profile.rank}"
    return f"{name} ({where})"


def describe_window(profile: Profile) -> str:
    """Which steps of how many."""
    steps = profile.window
    total = len(profile.steps.steps)
    named = {
        "annotations": "steps found by annotations",
        "repetition": "no annotations: steps found by what repeats",
        "nothing": "no annotations and nothing repeats: the whole trace is one step",
    }[profile.steps.found_by]
    if len(steps) == 1:
        step = steps[0]
        tokens = "" if step.label.tokens is None else f", {step.label.tokens} tokens"
        return f"step {step.index} of {total} ({step.label.kind.value}{tokens}); {named}"
    return f"steps {steps[0].index} to {steps[-1].index} of {total}, summed; {named}"


def describe_layers(profile: Profile) -> str:
    """How many, how long."""
    p50, p95 = profile.layer_span(0.50), profile.layer_span(0.95)
    if p50 is None or p95 is None:
        return "no layers found: nothing repeats"
    found = profile.layers_found_by
    return f"{len(profile.layers)} layers (found by {found}): p50 {p50 / 1e3:.1f} us, p95 {p95 / 1e3:.1f} us"


def describe_time(profile: Profile) -> list[str]:
    """Busy, idle, gaps, overlap, collectives, and what is in no step."""
    time = profile.time
    idle = time.span - time.busy
    lines = [
        f"span {ms(time.span)} ms: busy {ms(time.busy)} ms (union over {len(time.streams)} stream(s)),"
        f" idle {ms(idle)} ms; {ms(time.overlap)} ms ran beside another stream"
    ]
    if len(profile.window) > 1:
        lines.append(f"between the steps, and in none of them: idle for {ms(time.between)} ms more")
    if pause := time.longest_pause:
        where = f"in step {pause.in_step}" if pause.after_step is None else f"after step {pause.after_step}"
        lines.append(f"longest pause {ms(pause.ns)} ms, {where}, before {short_name(pause.before)}")
    for stream in time.streams:
        gaps = stream.gaps
        lines.append(
            f"stream {stream.stream}: {stream.kernels} kernels, busy {ms(stream.busy)} ms, gaps {ms(gaps.total)} ms:"
            f" host late {ms(gaps.host_late)}, launch call {ms(gaps.launch)}, device {ms(gaps.device)},"
            f" unknown {ms(gaps.unknown)}"
        )
    if time.collectives:
        lines.append(
            f"collectives {ms(time.collectives)} ms, {ms(time.exposed_collectives)} ms of it with nothing beside them:"
            " they spin while they wait for other ranks, so busy is not work"
        )
    if time.copies:
        lines.append(f"{time.copies} copies and memsets, {ms(time.copies_ns)} ms; they are in no phase")
    if outside := profile.steps.outside:
        total = sum(kernel.duration for kernel in outside)
        lines.append(f"in no step, and not counted here: {len(outside)} of the trace's kernels, {ms(total)} ms")
    return lines


def describe_experts(view: ExpertView) -> list[str]:
    """Bytes, rates and the fraction of peak of both expert GEMMs."""
    layer = view.shape.layer
    tokens = [t for t in view.tokens if t is not None]
    count = (
        f"T={tokens[0]}" if len(set(tokens)) == 1 == len(set(view.tokens)) else "T varies" if tokens else "T not known"
    )
    lines = [
        f"{view.shape.name}: {layer.local_experts} of {layer.experts} experts, top {layer.top_k}, H={layer.hidden}"
        f" I={layer.intermediate}, {view.weights} weights (says {view.weights_from}), {count}:"
        f" {view.active_experts:.1f} experts have rows (expected, balanced router)"
    ]
    for gemm in view.gemms:
        share = "" if gemm.fraction is None else f", {100 * gemm.fraction:.0f} % of peak"
        if gemm.fraction is not None and gemm.fraction > 1:
            share += "; more than the memory can do: is this the right shape?"
        lines.append(
            f"{gemm.phase.value}: {gemm.bytes / 1e9:.2f} GB must move, {ms(gemm.ns)} ms:"
            f" {gemm.rate / 1e12:.2f} TB/s{share}"
        )
    return lines


def describe_prediction(view: ExpertView, prediction: PathPrediction) -> str:
    """If these experts were on another path."""
    change = -prediction.saved / 1e6
    return (
        f"predicted: if these experts were {PATH_TEXT.get(prediction.path, prediction.path)}:"
        f" {change:+.2f} ms of {view.ns / 1e6:.2f} ms"
    )
