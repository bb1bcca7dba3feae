"""What the vendors' tools print, read through stubs of them."""

from __future__ import annotations

import csv
import os
import time

import pytest

from epfuse.serving.node import Gpus, Sampler, facts

NVIDIA = "0, 1980, 2619, 412.31, 71234, 54, 99\n1, 1980, 2619, 98.1, 4, 33, [N/A]\n"
ROCM = """{"card0": {"Temperature (Sensor junction) (C)": "45.0", "mclk clock speed:": "(1300Mhz)",
 "mclk clock level:": "3", "sclk clock speed:": "(2100Mhz)", "sclk clock level:": "1", "GPU use (%)": "87",
 "Current Socket Graphics Package Power (W)": "512.0", "VRAM Total Memory (B)": "206141652992",
 "VRAM Total Used Memory (B)": "107374182400"}, "system": {"Driver version": "6.8"}}"""
AMD = """[{"gpu": 0, "usage": {"gfx_activity": {"value": 87, "unit": "%"}}, "power": {"socket_power": {"value": 512}},
 "clock": {"gfx_0": {"clk": {"value": 2100}}, "mem_0": {"clk": {"value": 1300}}},
 "temperature": {"hotspot": {"value": 45}}, "mem_usage": {"used_vram": {"value": 102400, "unit": "MB"}}}]"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    def install(name: str, text: str, code: int = 0) -> None:
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        file.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return install


def test_nvidia(tool):
    tool("nvidia-smi", NVIDIA)
    first, second = Gpus("nvidia").sample()
    assert (first.gpu, first.clock, first.power, first.memory, first.busy) == (0, 1980.0, 412.31, 71234.0, 99.0)
    assert second.busy is None
    assert Gpus("nvidia").busy() == [0]


@pytest.mark.parametrize(("name", "text"), [("rocm-smi", ROCM), ("amd-smi", AMD)])
def test_amd(tool, name, text):
    tool(name, text)
    (sample,) = Gpus("amd").sample()
    assert (sample.clock, sample.memory_clock, sample.power, sample.temperature) == (2100.0, 1300.0, 512.0, 45.0)
    assert (sample.memory, sample.busy) == (102400.0, 87.0)
    assert Gpus("amd").busy() == [0]


@pytest.mark.parametrize("text", ["", "[]x", '{"a": 1}', "no devices were found"])
def test_a_tool_that_says_nothing_is_named(tool, text):
    tool("amd-smi", text, code=1)
    tool("rocm-smi", text, code=1)
    gpus = Gpus("amd")
    assert "rocm-smi gives nothing" in gpus.absent
    assert gpus.sample() == gpus.busy() == []


def test_absent_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Gpus("nvidia").absent == "nvidia-smi is not installed"
    assert facts(Gpus("nvidia"))["gpu_samples"] == "nvidia-smi is not installed"


def test_a_line_a_sample_and_gpu(tool, tmp_path):
    tool("nvidia-smi", NVIDIA)
    with Sampler(Gpus("nvidia"), tmp_path / "gpu.csv", 0.05):
        time.sleep(0.4)
    rows = list(csv.DictReader((tmp_path / "gpu.csv").open()))
    assert len(rows) >= 4
    assert {row["gpu"] for row in rows} == {"0", "1"}
    assert rows[0]["power"] == "412.31"
