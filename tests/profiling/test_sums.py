"""Sums that were worked out by hand, and that no order of events and no shift of the clock changes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from epfuse.profiling.phases import Phase
from epfuse.profiling.record import Profile
from tests.profiling.traces import ACT, GEMM, NORM, TraceFile

Run = Callable[..., Profile]
LABEL = "execute_context_0(0)_generation_4(4)"
ALIGN, MOE, SUM = "moe_align_block_size_kernel", "fused_moe_kernel", "moe_sum_kernel"
REDUCE = "ncclDevKernel_AllReduce_Sum_bf16"


def by_hand() -> TraceFile:
    """Two layers in stream 7, their collectives beside them in stream 9. Times in microseconds.

    stream 7: norm 2, projection 5, attention 7, projection 3 | align 1, GEMM 11.5, act 2.25, GEMM 6.125, sum 1.5, twice
    stream 9: an all-reduce of 4, of which the first 2 beside the layer's last kernel
    """
    trace = TraceFile()
    layer = [(NORM, 2.0), (GEMM, 5.0), ("flash_fwd_kernel", 7.0), (GEMM, 3.0), (ALIGN, 1.0), (MOE, 11.5), (ACT, 2.25)]
    layer += [(MOE, 6.125), (SUM, 1.5)]
    trace.range(LABEL, 0, 300)
    at = 1000.0
    launch = 1.0
    for _ in range(2):
        for name, duration in layer:
            trace.kernel(name, at, duration, correlation=trace.launch(launch, 1))
            at += duration + 0.5
            launch += 2
        trace.kernel(REDUCE, at - 0.5 - 2, 4, stream=9, correlation=trace.launch(launch, 1))
        launch += 2
        at += 2.5
    trace.kernel("Memcpy DtoH", at, 3, cat="gpu_memcpy", correlation=trace.launch(launch, 1))
    return trace


def test_by_hand(profile: Run) -> None:
    got = profile(by_hand())
    assert {p.phase: (p.calls, p.ns) for p in got.phases} == {
        Phase.NORM: (2, 4_000),
        Phase.PROJECTION: (4, 16_000),
        Phase.ATTENTION: (2, 14_000),
        Phase.PREPARE: (2, 2_000),
        Phase.GEMM1: (2, 23_000),
        Phase.ACTIVATION: (2, 4_500),
        Phase.GEMM2: (2, 12_250),
        Phase.COMBINE: (2, 3_000),
        Phase.COLLECTIVES: (2, 8_000),
    }
    assert got.unclassified == []
    assert got.warnings == []
    time = got.time
    # 39.375 a layer and 4 of collectives
    assert time.kernel_sum == sum(p.ns for p in got.phases) == 2 * 39_375 + 8_000
    # of each collective 1.5 + 0.5 beside the sum and behind it: 1.5 us of the sum's own time are both
    assert time.overlap == 2 * 1_500
    assert time.busy == 2 * 39_375 + 8_000 - time.overlap + 3_000
    assert (time.collectives, time.exposed_collectives) == (8_000, 8_000 - time.overlap)
    assert (time.copies, time.copies_ns) == (1, 3_000)
    assert sum(stream.busy for stream in time.streams) == time.busy + time.overlap
    for stream in time.streams:
        assert stream.busy + stream.gaps.total <= time.span


@pytest.mark.parametrize("seed", range(4))
def test_no_order_and_no_shift_changes_a_sum(profile: Run, seed: int) -> None:
    expected = profile(by_hand()).to_json()
    draw = random.Random(seed)
    trace = by_hand()
    draw.shuffle(trace.events)
    shift = draw.choice([0.0, 2.0**33, 65536.0 * 7])  # at 2**33 us a double still has nanoseconds
    for event in trace.events:
        event["ts"] += shift
    assert profile(trace).to_json() == expected


@pytest.mark.parametrize("seed", range(4))
def test_streams_may_be_renumbered_and_kernels_renamed_alike(profile: Run, seed: int) -> None:
    """Another stream number, and a name that no rule reads instead of one that a rule reads: only that one moves."""
    expected = {p.phase: p.ns for p in profile(by_hand()).phases}
    draw = random.Random(seed)
    streams = dict(zip((7, 9), draw.sample(range(1000), 2), strict=True))
    trace = by_hand()
    for event in trace.events:
        if "stream" in event.get("args", {}):
            event["args"]["stream"] = streams[event["args"]["stream"]]
    got = profile(trace)
    assert {p.phase: p.ns for p in got.phases} == expected
    for event in trace.events:
        if event["name"] == REDUCE:
            event["name"] = "strange"
    renamed = profile(trace)
    assert {p.phase: p.ns for p in renamed.phases} == {k: v for k, v in expected.items() if k is not Phase.COLLECTIVES}
    assert [(k.name, k.calls, k.ns) for k in renamed.unclassified] == [("strange", 2, 8_000)]
    assert renamed.time.kernel_sum == got.time.kernel_sum
