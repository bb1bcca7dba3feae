"""Profiles of made traces: every kernel is counted once, on one device, with the right time."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epfuse.errors import ConfigError, TraceError
from epfuse.profiling.classify import Classifier
from epfuse.profiling.names import short_name
from epfuse.profiling.phases import Phase
from epfuse.profiling.profile import profile_trace
from epfuse.profiling.read_trace import read_trace
from epfuse.profiling.record import LongestPause, Profile
from epfuse.profiling.sentences import describe_time
from epfuse.profiling.shapes import SHAPES
from tests.profiling.traces import ACT, ATTENTION_HALF, GEMM, MOE_LAYER, NORM, TOPK, TraceFile, server_step

DECODE = "execute_context_0(0)_generation_64(64)"
Run = Callable[..., Profile]

NAMES = [NORM, GEMM, ACT, TOPK, "fused_moe_kernel", "ncclDevKernel_AllReduce", "strange", "_matmul_ogs_swiglu_x"]


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.integers(0, 500), st.integers(0, 60), st.integers(0, 2)),
        min_size=1,
        max_size=60,
    )
)
def test_phases_partition_the_kernels(
    classifier: Classifier, tmp_path_factory: pytest.TempPathFactory, kernels: list[tuple[str, int, int, int]]
) -> None:
    trace = TraceFile()
    for name, start, duration, stream in kernels:
        trace.kernel(name, start, duration, stream=stream)
    path = trace.write(tmp_path_factory.mktemp("trace") / "trace.json")
    (profile,) = profile_trace(read_trace(path), classifier, window="auto")
    steps = profile.steps.steps
    (whole,) = profile_trace(read_trace(path), classifier, window=f"0..{len(steps) - 1}")
    assert whole.kernels_total == whole.kernels_in_trace == len(kernels)
    calls = sum(p.calls for p in whole.phases) + sum(k.calls for k in whole.unclassified)
    assert calls == len(kernels)
    total = sum(duration for _, _, duration, _ in kernels) * 1000
    assert sum(p.ns for p in whole.phases) + sum(k.ns for k in whole.unclassified) == total == whole.time.kernel_sum
    for phase in whole.phases:
        assert phase.calls == sum(kernel.calls for kernel in phase.kernels)
        assert phase.ns == sum(kernel.ns for kernel in phase.kernels)
    assert whole.time.busy <= total
    assert whole.time.busy <= whole.time.span
    assert 0 <= whole.time.exposed_collectives <= whole.time.collectives
    json.dumps(whole.to_json(), allow_nan=False)


def test_a_servers_step(profile: Run) -> None:
    trace = TraceFile()
    server_step(trace, DECODE, 100, dense=1, moe=4)
    got = profile(trace, shape=SHAPES["minimax-m3-ep8"])
    assert {phase.phase: phase.calls for phase in got.phases} == {
        Phase.INPUT: 1,
        Phase.NORM: 4 * 5 + 1,
        Phase.PROJECTION: 10,
        Phase.ATTENTION: 5,
        Phase.ROUTER: 8,
        Phase.PREPARE: 4,
        Phase.GEMM1: 4,
        Phase.ACTIVATION: 4,
        Phase.GEMM2: 4,
        Phase.COMBINE: 4,
        Phase.DENSE_FFN: 3,
        Phase.OUTPUT: 2,
    }
    assert got.unclassified == []
    assert len(got.layers) == 5
    assert got.product == "H100 SXM"
    assert got.experts is not None
    assert got.experts.tokens == [64]


def test_the_order_of_the_file_does_not_matter(profile: Run) -> None:
    trace = TraceFile()
    server_step(trace, DECODE, 100)
    before = profile(trace).to_json()
    random.Random(0).shuffle(trace.events)
    assert profile(trace).to_json() == before


def test_every_device_has_its_own_profile(classifier: Classifier, tmp_path: Path) -> None:
    trace = TraceFile()
    trace.sequence(MOE_LAYER * 3, 100, device=0)
    trace.sequence(MOE_LAYER * 2, 100, device=1)
    profiles = profile_trace(read_trace(trace.write(tmp_path / "two.json")), classifier)
    assert [(p.device.index, p.kernels_total) for p in profiles] == [(0, 3 * 14), (1, 2 * 14)]


def test_overlapping_streams_and_collectives(profile: Run) -> None:
    trace = TraceFile()
    trace.kernel(GEMM, 0, 100, stream=1)
    trace.kernel("ncclDevKernel_AllReduce", 60, 100, stream=2)
    trace.kernel(GEMM, 200, 10, stream=1)
    time = profile(trace).time
    assert (time.kernel_sum, time.busy, time.span) == (210_000, 170_000, 210_000)
    assert time.overlap == 40_000
    assert (time.collectives, time.exposed_collectives) == (100_000, 60_000)


def test_copies_are_busy_time_but_no_phase(profile: Run) -> None:
    trace = TraceFile()
    trace.kernel(GEMM, 0, 10)
    trace.kernel("Memcpy DtoH", 10, 5, cat="gpu_memcpy")
    got = profile(trace)
    assert (got.kernels_total, got.time.busy, got.time.copies, got.time.copies_ns) == (1, 15_000, 1, 5000)


def test_a_graphs_kernels_are_not_in_the_module_that_launched_it(profile: Run) -> None:
    trace = TraceFile()
    trace.range("nn.Module: SomeAttention_0", 0, 50, cat="python_function")
    graph = trace.launch(10, 5, name="cudaGraphLaunch")
    trace.sequence([*ATTENTION_HALF, "strange"], 100, correlation=graph)
    assert [kernel.name for kernel in profile(trace).unclassified] == ["strange"]


def test_our_stages_show_up_by_name(profile: Run) -> None:
    trace = TraceFile()
    trace.range("ProfilerStep#2", 0, 1000)
    for index, (stage, kernel) in enumerate(
        [("route", "route_kernel"), ("gate_up", "gate_up_sm90_kernel"), ("down", "down_kernel")]
    ):
        trace.range(f"epfuse::{stage}", 10 * index, 8)
        trace.kernel(kernel, 2000 + 10 * index, 5, correlation=trace.launch(10 * index + 2, 1))
    assert profile(trace).to_json()["ranges"] == [
        {"name": f"epfuse::{stage}", "kernels": 1, "us": 5.0} for stage in ("route", "gate_up", "down")
    ]


def test_several_steps_are_summed(profile: Run) -> None:
    trace = TraceFile()
    end = server_step(trace, DECODE, 100)
    server_step(trace, DECODE, end + 1000)
    one, both = profile(trace, window="0"), profile(trace, window="0..1")
    assert both.kernels_total == 2 * one.kernels_total
    assert both.time.span == 2 * one.time.span  # the pause between steps is in none
    assert len(both.layers) == 2 * len(one.layers)


def test_the_gpus_pauses_between_steps_are_told(profile: Run) -> None:
    """A second step begins 1000 us after the first one's end, and 300 us into that a kernel of no step runs for 7."""
    trace = TraceFile()
    end = server_step(trace, DECODE, 100)
    begin = end + 1000
    last = server_step(trace, DECODE, begin)
    trace.kernel("warm_up", end + 300, 7, correlation=trace.launch(end + 290, 2))
    one, both = profile(trace, window="0"), profile(trace, window="0..1")
    assert one.time.between == 0
    assert not any("between the steps" in line for line in describe_time(one))
    assert both.time.between == 993_000
    whole = round((last - 100) * 1000)
    assert both.time.span + both.time.between == whole - 7_000  # steps, pauses between them, and what is in none
    said = describe_time(both)
    assert "between the steps, and in none of them: idle for 0.993 ms more" in said
    first = both.window[1].kernels[0].name
    assert f"longest pause 0.693 ms, after step 0, before {short_name(first)}" in said
    time = both.to_json()["time"]
    assert time["between_steps_us"] == 993.0
    assert time["longest_pause"] == {"us": 693.0, "before": first, "after_step": 0, "in_step": None}
    assert profile(trace, window="1").time.longest_pause.in_step == 1


def test_the_longest_pause_may_lie_in_a_step(profile: Run) -> None:
    """Two of a step's kernels 2000 us apart, with another step's between them: the GPU's pause counts, not the gap."""
    trace = TraceFile()
    trace.range(DECODE, 0, 10)
    for name, start in ((NORM, 100), (GEMM, 2100)):
        trace.kernel(name, start, 4, correlation=trace.launch(2, 1))
    trace.range(DECODE, 20, 10)
    trace.kernel(ACT, 1000, 4, correlation=trace.launch(22, 1), stream=9)
    got = profile(trace, window="0..1").time
    assert (got.between, got.longest_pause) == (0, LongestPause(1_096_000, GEMM, None, 0))
    alone = profile(trace, window="1").time
    assert (alone.between, alone.longest_pause) == (0, None)


def test_what_has_begun_before_the_window_runs_in_it(profile: Run) -> None:
    """A kernel of the step before, on another stream, until half of the second step's only gap has gone."""
    trace = TraceFile()
    trace.range(DECODE, 0, 10)
    trace.kernel(ACT, 50, 1050, correlation=trace.launch(2, 1), stream=9)
    trace.range(DECODE, 20, 10)
    for name, start in ((NORM, 100), (GEMM, 2100)):
        trace.kernel(name, start, 4, correlation=trace.launch(22, 1))
    assert profile(trace, window="1").time.longest_pause == LongestPause(1_000_000, GEMM, None, 1)


def test_activities_of_no_duration_bound_a_pause(profile: Run) -> None:
    trace = TraceFile()
    trace.range(DECODE, 0, 10)
    for name, start in ((NORM, 100), (ACT, 150), (GEMM, 1150)):
        trace.kernel(name, start, 4 if name == ACT else 0, correlation=trace.launch(2, 1))
    time = profile(trace).time
    assert time.longest_pause == LongestPause(996_000, GEMM, None, 0)
    assert (time.span, time.busy) == (1_050_000, 4_000)


def test_a_trace_of_the_cpu_only(classifier: Classifier, tmp_path: Path) -> None:
    trace = TraceFile()
    trace.range("aten::mm", 0, 5, cat="cpu_op")
    with pytest.raises(TraceError, match=r"cpu.json has 1 events but no GPU kernel; record it with"):
        profile_trace(read_trace(trace.write(tmp_path / "cpu.json")), classifier)


def test_weights_that_nobody_knows(profile: Run, tmp_path: Path) -> None:
    from epfuse.profiling.shapes import read_config

    config = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "own"}}))
    shape = read_config(tmp_path / "config.json")
    trace = TraceFile()
    server_step(trace, DECODE, 100)
    with pytest.raises(ConfigError, match="needs --weights"):
        profile(trace, shape=shape)
    assert profile(trace, shape=shape, weights="mxfp8").experts is not None


def test_kernels_in_no_step_are_told(profile: Run) -> None:
    trace = TraceFile()
    end = server_step(trace, DECODE, 100)
    inside = profile(trace)
    assert not any("in no step" in line for line in describe_time(inside))
    trace.kernel("warm_up", end + 100, 7, correlation=trace.launch(end + 90, 2))
    got = profile(trace)
    assert got.kernels_total == inside.kernels_total == got.kernels_in_trace - 1
    assert "in no step, and not counted here: 1 of the trace's kernels, 0.007 ms" in describe_time(got)
    assert got.to_json()["outside_steps"] == {"kernels": 1, "us": 7.0}
