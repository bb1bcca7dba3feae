"""Ids belong to a process, a device, a rank; kernels get their own call, or none, and never another's."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epfuse.profiling.classify import Classifier
from epfuse.profiling.events import Trace
from epfuse.profiling.identities import identity, process_of
from epfuse.profiling.profile import profile_trace
from epfuse.profiling.read_trace import read_trace
from epfuse.profiling.record import Profile
from epfuse.profiling.sentences import describe_device
from tests.profiling.traces import TraceFile, server_step

DECODE = "execute_context_0(0)_generation_8(8)"
PREFILL = "execute_context_2(300)_generation_0(0)"
MI300X_NAME = {"name": "AMD Instinct MI300X", "numSms": 304, "warpSize": 64}


def read(trace: TraceFile, folder: Path) -> Trace:
    return read_trace(trace.write(folder / "trace.json"))


def step_events(name: str, label: str, host: Any, gpu: Any, device: int, delay: float = 0.0) -> list[dict[str, Any]]:
    """A labelled step of one kernel as one process writes it: correlation id 7, stream 7."""
    host = {"ph": "X", "pid": host, "tid": 5}
    where = {"device": device, "stream": 7, "correlation": 7}
    return [
        host | {"cat": "user_annotation", "name": label, "ts": 100 + delay, "dur": 50},
        host
        | {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 110 + delay, "dur": 5, "args": {"correlation": 7}},
        {"ph": "X", "cat": "kernel", "name": name, "pid": gpu, "tid": 7, "ts": 120 + delay, "dur": 10, "args": where},
    ]


def merged(*groups: list[dict[str, Any]]) -> TraceFile:
    trace = TraceFile()
    trace.events = [event for group in groups for event in group]
    return trace


def steps_by_device(profiles: list[Profile]) -> dict[str, tuple[str, list[str]]]:
    return {
        describe_device(p): (p.window[0].label.text, [k.name for step in p.steps.steps for k in step.kernels])
        for p in profiles
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, 7),
        ("7", 7),
        (7.0, 7),
        ("TP0", "TP0"),
        (2**53 - 1.0, 2**53 - 1),
        (float(2**53), None),
        (2**60 + 1, 2**60 + 1),
        (7.5, None),
        (True, None),
        (None, None),
        ([7], None),
        ("", None),
        ("x" * 1000, None),
        (float("nan"), None),
    ],
)
def test_one_form_of_an_id(value: object, expected: object) -> None:
    got = identity(value)
    assert (got, type(got)) == (expected, type(expected))


def test_a_merging_tools_prefix_is_the_rank() -> None:
    assert process_of("[TP00-EP01] 553") == ("TP00-EP01", 553)
    assert process_of(553) == process_of("553") == ("", 553)


@pytest.mark.parametrize("swap", [False, True])
def test_two_ranks_with_the_same_ids(classifier: Classifier, tmp_path: Path, swap: bool) -> None:
    """Each sees its own GPU as device 0, and both count streams and correlation ids from the same numbers."""
    groups = [
        step_events("of 0", DECODE, "[TP00] 553", "[TP00] 0", 0),
        step_events("of 1", PREFILL, "[TP01] 553", "[TP01] 0", 0, delay=3),
    ]
    trace = merged(*(reversed(groups) if swap else groups))
    profiles = profile_trace(read(trace, tmp_path), classifier)
    assert steps_by_device(profiles) == {
        "H100 SXM (device 0 of TP00)": (DECODE, ["of 0"]),
        "H100 SXM (device 0 of TP01)": (PREFILL, ["of 1"]),
    }
    assert all(p.warnings == [] for p in profiles)


def test_a_pid_that_was_moved_makes_another_device(classifier: Classifier, tmp_path: Path) -> None:
    """What other tools do: 100000 more on every pid of the second rank; args.device stays."""
    trace = merged(step_events("a", DECODE, 553, 0, 0), step_events("b", DECODE, 100553, 100000, 0, delay=1000))
    profiles = profile_trace(read(trace, tmp_path), classifier)
    assert [[k.name for s in p.steps.steps for k in s.kernels] for p in profiles] == [["a"], ["b"]]
    assert [describe_device(p) for p in profiles] == [
        "H100 SXM (device 0 of pid 0)",
        "H100 SXM (device 0 of pid 100000)",
    ]


def test_an_id_that_two_processes_use_is_no_link(classifier: Classifier, tmp_path: Path) -> None:
    trace = merged(step_events("a", DECODE, 553, 0, 0), step_events("b", PREFILL, 554, 1, 1))
    profiles = profile_trace(read(trace, tmp_path), classifier)
    assert [p.steps.found_by for p in profiles] == ["nothing", "nothing"]
    assert profiles[0].warnings == [
        "2 activities have a correlation id that several processes use; the trace seems merged from theirs: which call"
        " launched what they belong to is not known"
    ]


def test_what_a_device_s_other_kernels_tell(tmp_path: Path) -> None:
    trace = merged(step_events("a", DECODE, 553, 0, 0), step_events("b", PREFILL, 554, 1, 1))
    for pid, device in ((553, 0), (554, 1)):
        for correlation in range(100 + 1000 * device, 120 + 1000 * device):
            trace.events += step_events(f"k{correlation}", "x", pid, device, device, delay=20 * correlation)
            for event in trace.events[-2:]:
                event["args"]["correlation"] = correlation
    got = read(trace, tmp_path)
    launched = {k.name: got.launches[k.correlation].thread for k in got.kernels}
    assert launched["a"] == (("", 553), 5)
    assert launched["b"] == (("", 554), 5)
    assert got.warnings == []


def test_ids_of_one_process_that_repeat(tmp_path: Path) -> None:
    trace = TraceFile()
    call = {
        "ph": "X",
        "cat": "cuda_runtime",
        "name": "cudaLaunchKernel",
        "pid": 9,
        "tid": 1,
        "args": {"correlation": 3},
    }
    trace.events += [call | {"ts": 10, "dur": 5}, call | {"ts": 11, "dur": 2, "cat": "cuda_driver", "name": "cuLaunch"}]
    trace.kernel("k", 20, 1, correlation=3)
    nested = read(trace, tmp_path)
    assert nested.launches[nested.kernels[0].correlation].name == "cudaLaunchKernel"
    trace.events.append(call | {"ts": 500, "dur": 5})
    got = read(trace, tmp_path)
    assert got.launches == {}
    assert got.warnings[0].startswith("1 correlation ids stand for several calls of one process")


@pytest.mark.parametrize("form", [int, str, float])
def test_the_type_of_an_id_does_not_matter(
    profile: Callable[..., Profile], tmp_path: Path, form: Callable[[int], Any]
) -> None:
    plain = TraceFile()
    server_step(plain, DECODE, 100)
    expected = profile(plain).to_json()
    for event in plain.events:
        if event["cat"] == "cuda_runtime":  # the kernels' stay integers
            event["args"]["correlation"] = form(event["args"]["correlation"])
        event["pid"], event["tid"] = form(event["pid"]), form(event["tid"])
    assert profile(plain).to_json() == expected


def test_a_float_too_large_to_be_an_id(profile: Callable[..., Profile]) -> None:
    trace = TraceFile()
    for step in range(2):
        trace.range(DECODE, 100 * step, 90)
        trace.kernel(f"k{step}", 100 * step + 20, 1, correlation=2.0**60)
        trace.events.append(
            {"ph": "X", "cat": "cuda_runtime", "name": "l", "pid": 9, "tid": 1, "ts": 100 * step + 10, "dur": 1}
            | {"args": {"correlation": 2.0**60}}
        )
    got = profile(trace)
    assert got.steps.found_by == "nothing"
    assert got.warnings[0].startswith("4 events have a correlation id that is no exact integer")


@pytest.mark.parametrize("seed", range(3))
def test_renumbered_ids_and_another_order(profile: Callable[..., Profile], seed: int) -> None:
    """Any one-to-one change of ids leaves everything but the ids themselves as it was."""
    trace = TraceFile()
    end = server_step(trace, DECODE, 100)
    server_step(trace, PREFILL, end + 50)
    expected = profile(trace, window="0..1").to_json()
    draw = random.Random(seed)
    new: dict[tuple[str, Any], int] = {}

    def renumber(kind: str, value: Any) -> int:
        return new.setdefault((kind, value), draw.randrange(2**40))

    for event in trace.events:
        arguments = event.get("args", {})
        if "correlation" in arguments:
            arguments["correlation"] = renumber("correlation", arguments["correlation"])
        if event["cat"] != "kernel":
            event["pid"], event["tid"] = renumber("pid", event["pid"]), renumber("tid", event["tid"])
    draw.shuffle(trace.events)
    assert profile(trace, window="0..1").to_json() == expected


@pytest.mark.parametrize(
    ("properties", "device", "product"),
    [
        ([{"id": 0} | MI300X_NAME], 2, "MI300X"),
        ([{"id": i} | MI300X_NAME for i in range(8)], 9, "MI300X"),
        # ROCm's 1 is an agent, the list's 1 a GPU: they may be two
        ([{"id": 0} | MI300X_NAME, {"id": 1, "name": "AMD Instinct MI325X", "warpSize": 64}], 1, None),
        ([{"id": 0, "name": "NVIDIA H200"}], 3, "H200"),
        ([{"id": 0, "name": "NVIDIA H200"}, {"id": 1, "name": "NVIDIA B200"}], 1, "B200"),
        ([{"id": 0, "name": "NVIDIA H200"}, {"id": 0, "name": "NVIDIA B200"}], 0, None),
        ([{"id": 0, "name": "NVIDIA H200"}, {"id": 1, "name": "NVIDIA B200"}], 2, None),
        ([], 0, None),
    ],
)
def test_which_gpu_it_was(
    profile: Callable[..., Profile], properties: list[dict[str, Any]], device: int, product: str | None
) -> None:
    trace = TraceFile()
    trace.other["deviceProperties"] = properties
    trace.kernel("k", 1, 1, device=device)
    got = profile(trace)
    assert (got.product, got.device.index) == (product, device)
