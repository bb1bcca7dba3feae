"""tools/call_counters.py and tools/burst_and_steady.py, with programs in place of ncu and nvidia-smi."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from tools import call_counters
from tools.burst_and_steady import samples_of, watched
from tools.call_counters import METRICS, known_metrics, main, parse_points, read_counters, short

from epfuse.errors import ConfigError

TABLE = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","sm__cycles_active.avg"
"","","","ns","byte","cycle"
"0","7","before_all","5","5","5"
"1","7","void at::native::vectorized_elementwise_kernel<4, erfinv_kernel_cuda(...)>(int)","1,000","0","1"
"2","7","route_kernel","3,200","1000000","10.5"
"3","7","gate_up_down_kernel","324,300","942400000","544,728"
"4","7","void at::native::erfinv_kernel<float>(int)","1,000","0","1"
"5","7","gate_up_down_kernel","341,000","n/a","563,399"
"""


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_counters_go_to_the_call_that_they_are_of() -> None:
    first, second = read_counters(TABLE, METRICS)
    assert first == [
        {"kernel": "route_kernel", "us": 3.2, "read_mb": 1.0, "active_cycles": 10.5},
        {"kernel": "gate_up_down_kernel", "us": 324.3, "read_mb": 942.4, "active_cycles": 544700.0},
    ]
    assert second == [{"kernel": "gate_up_down_kernel", "us": 341.0, "active_cycles": 563400.0}]
    with pytest.raises(ConfigError, match="no table"):
        read_counters("==ERROR== ERR_NVGPUCTRPERM", METRICS)


def test_metrics_that_ncu_lacks_are_not_asked_for(tmp_path: Path) -> None:
    program(tmp_path, "ncu", "echo 'Device NVIDIA H200'; echo 'dram__bytes_read   counter  byte'")
    assert known_metrics(str(tmp_path / "ncu")) == {"read_mb": METRICS["read_mb"]}
    program(tmp_path, "silent", "exit 1")
    assert known_metrics(str(tmp_path / "silent")) == METRICS


def test_counters_come_from_one_run_of_ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "table").write_text(TABLE)
    program(
        tmp_path, "ncu", f'[ "$1" = --query-metrics ] && exit; echo "$@" >{tmp_path}/asked; cat {tmp_path}/table >$7'
    )
    assert [len(call) for call in call_counters.counted("w8a16", [1, 16], 30)] == [2, 1]
    asked = (tmp_path / "asked").read_text()
    assert "--launch w8a16@1,16" in asked
    assert "--cache-control all" in asked
    call_counters.counted("w8a16", [256], 30)
    assert "--cache-control none" in (tmp_path / "asked").read_text()
    program(tmp_path, "ncu", "echo ERR_NVGPUCTRPERM; exit 1")
    with pytest.raises(ConfigError, match="ERR_NVGPUCTRPERM"):
        call_counters.counted("w8a16", [1], 30)


def test_the_table_has_a_line_for_each_large_kernel(tmp_path: Path) -> None:
    counters = [
        {"kernel": "gate_up", "us": 200.0, "read_mb": 600.0, "active_cycles": 90.0, "cycles": 100.0},
        {"kernel": "route", "us": 5.0},
        {"kernel": "down", "us": 100.0, "memory_percent": 91.25},
    ]
    durations = [{"kernel": "route", "us": 4.0, "gap_us": 0.0}, {"kernel": "gate_up", "us": 190.0, "gap_us": 1.0}]
    points = [{"path": "w8a8", "tokens": 4096, "rows": 2000, "counters": counters, "durations": durations}]
    points += [{"path": "bf16", "tokens": 1, "rows": 2, "durations": durations}]
    (tmp_path / "record.json").write_text(json.dumps({"points": points}))
    lines = CliRunner().invoke(main, [str(tmp_path / "record.json"), "--table"]).output.splitlines()[2:]
    assert lines == [
        "| w8a8 | 4096 | 2000 | route 4.0, gate_up 190.0 | gate_up | 200 | 600 | - | - | - | - | - | 90.0 |",
        "|  |  |  |  | down | 100 | - | - | 91.25 | - | - | - | - |",
        "| bf16 | 1 | 2 | route 4.0, gate_up 190.0 | - | - | - | - | - | - | - | - | - |",
    ]


def test_points_and_names() -> None:
    assert parse_points(("w8a16@1,16", "bf16@4096")) == [("w8a16", [1, 16]), ("bf16", [4096])]
    for wrong in ("w8a16", "w8a16@", "w8a16@1,x", "w4a16@1"):
        with pytest.raises(click.UsageError):
            parse_points((wrong,))
    assert short("void at::native::(anonymous namespace)::sin_kernel<float>(int)") == "sin_kernel"
    assert short("gate_up_sm90_kernel") == "gate_up_sm90_kernel"


def test_what_nvidia_smi_saw_in_the_last_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    loop = 'i=0; while :; do i=$((i + 1)); echo "now, $((1000 + i)), 700.5, 40, 0x4"; sleep 0.02; done'
    program(tmp_path, "nvidia-smi", loop)

    def run() -> float:
        time.sleep(1.0)
        return 7.0

    found, seen = watched("GPU-1", run)
    assert found == 7.0
    assert seen["mhz"] > 1000 + seen["samples"]  # not from the beginning on
    assert (seen["watts"], seen["reasons"]) == (700.5, ["0x4"])
    assert samples_of(["now, [N/A], 1, 2, 0x0", "cut"]) == {"samples": 0}
