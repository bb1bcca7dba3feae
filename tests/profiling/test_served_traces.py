"""Two decode steps of a server on two H200s without our experts and two with them (tests/data/README.md)."""

from __future__ import annotations

import gzip
import json
import statistics
from typing import Any

import pytest

from epfuse.profiling.classify import Classifier
from epfuse.profiling.phases import Phase
from epfuse.profiling.profile import profile_trace
from epfuse.profiling.read_trace import read_trace
from epfuse.profiling.record import Profile
from tests.profiling.traces import DATA

TRACES = {name: DATA / f"h200-vllm-decode-m3-{name}.trace.json.gz" for name in ("marlin", "epfuse")}
ENDS = {"marlin": ("moe_align_block_size_kernel", "moe_sum"), "epfuse": ("route_kernel", "combine_kernel")}
"""The first and the last kernel of a layer's experts."""
MOE_LAYERS = 15


def profiled(name: str, classifier: Classifier) -> Profile:
    (found,) = profile_trace(read_trace(TRACES[name]), classifier)
    return found


def kernels(name: str) -> list[dict[str, Any]]:
    """In the order of their starts."""
    events = json.loads(gzip.decompress(TRACES[name].read_bytes()))["traceEvents"]
    return sorted((event for event in events if event.get("cat") == "kernel"), key=lambda event: event["ts"])


def experts_us(name: str) -> list[float]:
    """Of each layer, from its first kernel's start to its last one's end: our kernels begin before others end."""
    first, last = ENDS[name]
    found: list[float] = []
    begun = 0.0
    for kernel in kernels(name):
        if first in kernel["name"]:
            begun = kernel["ts"]
        elif last in kernel["name"] and begun:
            found.append(kernel["ts"] + kernel["dur"] - begun)
            begun = 0.0
    return found


@pytest.mark.parametrize("name", TRACES)
def test_where_a_steps_time_goes(name: str, classifier: Classifier) -> None:
    profile = profiled(name, classifier)
    assert (profile.product, len(profile.steps.steps), len(profile.layers)) == ("H200", 2, MOE_LAYERS + 1)
    calls = {phase.phase: phase.calls for phase in profile.phases}
    assert calls[Phase.GEMM1] == calls[Phase.GEMM2] == MOE_LAYERS
    assert {kernel.name for kernel in profile.unclassified} == {"memcpy32_post"}
    time = profile.time
    assert time.span - time.busy < 0.02 * time.span  # the GPU is never without work: graphs are replayed
    assert sum(stream.gaps.host_late for stream in time.streams) == 0


def test_our_experts_take_less_of_a_served_step(classifier: Classifier) -> None:
    ours, marlin = (experts_us(name) for name in ("epfuse", "marlin"))
    assert len(ours) == len(marlin) == 2 * MOE_LAYERS
    experts = statistics.fmean(ours) / statistics.fmean(marlin)
    step = profiled("epfuse", classifier).time.span / profiled("marlin", classifier).time.span
    assert 0.92 < experts < 0.96  # four fifths of a step
    assert 0.93 < step < 0.97


@pytest.mark.parametrize("name", TRACES)
def test_a_served_trace_tells_nothing_of_its_host(name: str) -> None:
    trace = json.loads(gzip.decompress(TRACES[name].read_bytes()))
    assert not {"host_name", "traceName", "trace_id", "distributedInfo"} & set(trace)
    assert b"site-packages" not in gzip.decompress(TRACES[name].read_bytes())
