"""Events that are kept, in which form, and those that are refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from epfuse.errors import TraceError
from epfuse.profiling.events import Trace
from epfuse.profiling.read_trace import LONGEST_NAME, read_trace
from tests.profiling.traces import TraceFile


def read(trace: TraceFile, folder: Path) -> Trace:
    return read_trace(trace.write(folder / "trace.json.gz"))


def test_what_is_kept(tmp_path: Path) -> None:
    trace = TraceFile()
    trace.other["distributedInfo"] = {"rank": 3}
    trace.range("epfuse::route", 100.0, 9)
    trace.range("nn.Module: Experts_3", 100.5, 8, cat="python_function")
    trace.range("torch/utils/_contextlib.py(117): decorate_context", 100.5, 8, cat="python_function")
    correlation = trace.launch(101.0, 2.5)
    trace.kernel("second", 120.0, 1.001, correlation=correlation, stream=9, device=1)
    trace.kernel("first", 110.0, 1, stream=8)
    trace.kernel("Memcpy DtoD", 105.0, 1, cat="gpu_memcpy")
    trace.kernel("Memset", 104.0, 1, cat="gpu_memset")
    trace.kernel("on the GPU", 104.0, 9, cat="gpu_user_annotation")
    trace.events += [{"ph": "M", "name": "process_name"}, {"cat": 3}, {"ph": "X", "cat": ["kernel"]}]
    got = read(trace, tmp_path)
    assert [(k.name, k.start, k.duration, k.device, k.stream) for k in got.kernels] == [
        ("first", 10_000, 1000, 0, 8),
        ("second", 20_000, 1001, 1, 9),
    ]
    assert got.launches[correlation].start == 1000
    assert [copy.name for copy in got.copies] == ["Memset", "Memcpy DtoD"]
    assert [item.name for item in got.ranges] == ["epfuse::route", "nn.Module: Experts_3"]
    assert [(item.name, item.thread) for item in got.gpu_ranges] == [("on the GPU", (0, 7))]
    assert (got.rank, got.devices[0].name, got.events) == (3, "NVIDIA H100 80GB HBM3", 12)


def test_microseconds_since_boot_keep_their_nanoseconds(tmp_path: Path) -> None:
    trace = TraceFile()
    trace.kernel("a", 6520618861901.683, 4.439)
    trace.kernel("b", 6520618861906.122, 0.001)
    first, second = read(trace, tmp_path).kernels
    assert first.end == second.start == 4439
    assert second.duration == 1


@pytest.mark.parametrize("value", [None, "12", True, math.nan, math.inf, -math.inf, 1e300, 10**400, [], -1e18])
@pytest.mark.parametrize("key", ["ts", "dur"])
def test_a_time_must_be_a_number(tmp_path: Path, key: str, value: Any) -> None:
    trace = TraceFile()
    trace.kernel("good", 1.0, 1.0)
    trace.kernel("bad", 1.0, 1.0)
    trace.events[1][key] = value
    with pytest.raises(TraceError, match=rf"trace.json.gz: event 2 \(kernel\) has {key}="):
        read(trace, tmp_path)


def test_other_events_that_are_refused(tmp_path: Path) -> None:
    for change, words in (
        ({"dur": -0.5}, "must not be negative"),
        ({"name": 7}, "must be a string"),
        ({"args": None, "pid": "x", "tid": "y"}, "names no device and stream"),
    ):
        trace = TraceFile()
        trace.kernel("bad", 1.0, 1.0)
        trace.events[0].update(change)
        with pytest.raises(TraceError, match=words):
            read(trace, tmp_path)


def test_names_can_neither_move_the_cursor_nor_fill_the_screen(tmp_path: Path) -> None:
    trace = TraceFile()
    trace.kernel("red\x1b[31m\n\u202e\ud800\ufffedrawkcab", 1.0, 1.0)
    trace.kernel("x" * 100_000, 2.0, 1.0)
    first, second = read(trace, tmp_path).kernels
    assert first.name == "red\ufffd[31m\ufffd\ufffd\ufffd\ufffddrawkcab"
    assert len(second.name) == LONGEST_NAME


def test_odd_device_properties_are_no_error(tmp_path: Path) -> None:
    trace = TraceFile()
    trace.other["deviceProperties"] = [7, {"id": "x", "name": 3, "numSms": "many"}, {"id": 1, "name": "B200"}]
    trace.kernel("k", 1, 1, device=1)
    trace.other["distributedInfo"] = [1]
    got = read(trace, tmp_path)
    assert got.devices[1].name == "B200"
    assert got.rank is None
