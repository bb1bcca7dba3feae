"""Impossible times are told, on the terminal, in the record and in the page; possible ones are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from epfuse.cli.main import main
from epfuse.profiling.classify import Classifier
from epfuse.profiling.page import profile_page
from epfuse.profiling.profile import profile_trace
from epfuse.profiling.read_trace import read_trace
from epfuse.profiling.record import Profile
from tests.profiling.traces import DATA, GEMM, TraceFile, server_step

DECODE = "execute_context_0(0)_generation_8(8)"
SINCE_BOOT = 6520618861901.683


def server(ts: float = SINCE_BOOT) -> TraceFile:
    trace = TraceFile()
    server_step(trace, DECODE, ts)
    return trace


def kernel_of(trace: TraceFile, number: int) -> dict[str, object]:
    return [event for event in trace.events if event["cat"] == "kernel"][number]


def change(trace: TraceFile, **values: float) -> TraceFile:
    kernel_of(trace, 20).update(values)
    return trace


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        (change(server(), ts=0.0), "1 activity starts 6520619 s apart from all others (is ts 0 or damaged?)"),
        (change(server(), dur=9e9), "1 activity lasts longer than the whole trace (9000000.000 ms)"),
        (change(server(ts=100), ts=0), "1 activity starts up to 180.000 us before the call that launched them"),
        (change(server(), dur=6.5), "on stream 7 of device 0 1 activities run beside another one, for 1.500 us in sum"),
        (server(ts=-100), "events start before the clock's zero (ts is negative)"),
    ],
    ids=["ts 0 since boot", "too long", "ts 0", "overlap", "negative"],
)
def test_what_can_not_be_is_said(classifier: Classifier, tmp_path: Path, trace: TraceFile, words: str) -> None:
    path = trace.write(tmp_path / "odd.json")
    found = profile_trace(read_trace(path), classifier)
    assert any(words in warning for warning in found[0].warnings), found[0].warnings
    result = CliRunner().invoke(main, ["profile", str(path)])
    assert result.exit_code == 0
    assert f"warning: {found[0].warnings[0]}" in result.stdout
    record = json.loads(CliRunner().invoke(main, ["profile", str(path), "--json"]).stdout)
    assert record["warnings"] == found[0].warnings
    assert profile_page(found, comparison=False).count("Warning: ") == len(found[0].warnings)


def test_both_traces_of_a_comparison_warn(tmp_path: Path) -> None:
    good, odd = server().write(tmp_path / "good.json"), change(server(), dur=6.5).write(tmp_path / "odd.json")
    printed = CliRunner().invoke(main, ["profile", "--compare", str(good), str(odd)]).stdout
    assert "warning: B: on stream 7" in printed
    assert "warning: A" not in printed


def test_a_sound_trace_has_no_warnings(profile: Callable[..., Profile]) -> None:
    assert profile(server()).warnings == []
    assert profile(server(ts=0)).warnings[0].startswith("5 events start before")  # the step and four launches


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.glob("*.json.gz")))
def test_real_traces_have_none(name: str) -> None:
    """But where kernels begin early by dependent launches, or a graph has branches: that is said, and true."""
    warnings = read_trace(DATA / name).warnings
    if name.startswith("h200-vllm-decode-m3"):
        assert len(warnings) == 1
        assert "activities run beside another one" in warnings.pop()
    assert warnings == []


@pytest.mark.parametrize("ts", [1697123456789012.25, 1697123456789012])
def test_times_that_a_double_or_whole_microseconds_round_do_not_overlap(
    profile: Callable[..., Profile], ts: float
) -> None:
    trace = TraceFile()
    for index in range(40):  # 4.9 us each, and written at the nearest quarter, or at the whole one below
        trace.kernel(GEMM, type(ts)(ts + 4.9 * index), type(ts)(5) if type(ts) is int else 4.9)
    assert profile(trace).warnings == []
