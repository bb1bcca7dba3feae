"""Steps by annotations and by repetition, and windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from epfuse.errors import ConfigError
from epfuse.profiling.annotations import StepKind
from epfuse.profiling.read_trace import read_trace
from epfuse.profiling.steps import DeviceSteps, choose_steps, find_steps
from tests.profiling.traces import HEAD, MOE_LAYER, TAIL, TraceFile, server_step

DECODE = "execute_context_0(0)_generation_8(8)"
PREFILL = "execute_context_2(300)_generation_0(0)"


def steps_of(trace: TraceFile, folder: Path, device: int = 0) -> DeviceSteps:
    return find_steps(read_trace(trace.write(folder / "trace.json")))[device]


def test_a_kernel_belongs_to_the_step_that_launched_it(tmp_path: Path) -> None:
    """GPUs run behind: a kernel starts while the host is in the next step."""
    trace = TraceFile()
    for index, label in enumerate([PREFILL, DECODE]):
        trace.range(label, 100 * index, 90)
        correlation = trace.launch(100 * index + 10, 5)
        trace.kernel(f"of step {index}", 500 + 100 * index, 50, correlation=correlation)
        trace.kernel("copy", 480 + 100 * index, 5, correlation=correlation, cat="gpu_memcpy")
    outside = trace.launch(300, 5)
    trace.kernel("between steps", 900, 5, correlation=outside)
    found = steps_of(trace, tmp_path)
    assert found.found_by == "annotations"
    assert [(s.label.kind, [k.name for k in s.kernels]) for s in found.steps] == [
        (StepKind.PREFILL, ["of step 0"]),
        (StepKind.DECODE, ["of step 1"]),
    ]
    assert [len(step.copies) for step in found.steps] == [1, 1]
    assert [kernel.name for kernel in found.outside] == ["between steps"]


def test_without_launches_the_gpus_own_ranges_count(tmp_path: Path) -> None:
    trace = TraceFile()
    for index in range(2):
        trace.kernel(DECODE, 100 * index, 90, cat="gpu_user_annotation")
        trace.kernel(f"k{index}", 100 * index + 5, 50)
    found = steps_of(trace, tmp_path)
    assert [[k.name for k in s.kernels] for s in found.steps] == [["k0"], ["k1"]]


def test_a_servers_annotation_is_preferred_to_the_profilers(tmp_path: Path) -> None:
    trace = TraceFile()
    trace.range("ProfilerStep#3", 0, 1000)
    for index in range(3):
        trace.range("step[DECODE bs=4]", 100 * index, 90)
        trace.kernel("k", 2000 + index, 1, correlation=trace.launch(100 * index + 1, 1))
    assert [step.label.text for step in steps_of(trace, tmp_path).steps] == ["step[DECODE bs=4]"] * 3


def test_steps_of_a_trace_without_annotations(tmp_path: Path) -> None:
    trace = TraceFile()
    end = 0.0
    for _ in range(3):
        end = server_step(trace, "", end + 500, annotate=False)
    found = steps_of(trace, tmp_path)
    assert found.found_by == "repetition"
    expected = len(HEAD + MOE_LAYER * 4 + TAIL) + 10  # and one dense layer
    assert [len(step.kernels) for step in found.steps] == [expected] * 3
    assert [step.kernels[0].name for step in found.steps] == HEAD * 3


def test_nothing_repeats_so_the_trace_is_one_step(tmp_path: Path) -> None:
    trace = TraceFile()
    trace.sequence(["a", "b", "c"], 0)
    found = steps_of(trace, tmp_path)
    assert (found.found_by, len(found.steps), len(found.steps[0].kernels)) == ("nothing", 1, 3)


@pytest.fixture
def three(tmp_path: Path) -> DeviceSteps:
    trace = TraceFile()
    end = server_step(trace, PREFILL, 100)
    for moe in (6, 2, 4):
        end = server_step(trace, DECODE, end + 100, moe=moe)
    return steps_of(trace, tmp_path)


@pytest.mark.parametrize(
    ("window", "indices"), [("auto", [3]), ("0", [0]), ("3", [3]), ("1..2", [1, 2]), ("0..3", [0, 1, 2, 3])]
)
def test_windows(three: DeviceSteps, window: str, indices: list[int]) -> None:
    assert [step.index for step in choose_steps(three, window)] == indices


@pytest.mark.parametrize("window", ["4", "2..1", "0..9", "-1", "first", "", "1..", "1.5", "99999999999999"])
def test_windows_that_are_none(three: DeviceSteps, window: str) -> None:
    with pytest.raises(ConfigError, match="window is"):
        choose_steps(three, window)
