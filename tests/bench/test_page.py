from __future__ import annotations

import io
from xml.etree import ElementTree

import pytest
from rich.console import Console

from epfuse.bench.charts import charts_of
from epfuse.bench.compare import RecordComparison, compare_records
from epfuse.bench.console import print_record
from epfuse.bench.page import bench_page, chart_svg
from epfuse.bench.png import chart_png
from epfuse.bench.record import BenchRecord
from tests.bench.records import peer, record, row

CLOCKS = {"driver": "580.1", "sm_mhz": 1980.0, "max_sm_mhz": 1980.0, "memory_mhz": 2619.0}
CLOCKS |= {"max_memory_mhz": 2619.0, "temperature_c": 50.0, "power_limit_w": 700.0}
RUN = {"command": "epfuse bench", "date": "2026-01-02", "clocks": {"at the end": CLOCKS, "at the start": None}}
RUN |= {"commit": {"hash": "0123abc", "changed": True}, "versions": {"torch": "2.10", "vllm": None}}


@pytest.fixture
def now() -> BenchRecord:
    return record(
        row(us=250.0),
        row("bf16", us=None, weights="dense", failure="the result is wrong: <b>0.3</b>", wrong=True),
        peer("vLLM Marlin", 500.0),
        peer("transformers eager", None, failure="RuntimeError: no", relative_error=None),
        run=RUN,
    )


@pytest.fixture
def comparison(now: BenchRecord) -> RecordComparison:
    return compare_records(record(row(us=200.0), peer("vLLM Marlin", 501.0), device={"name": "GPU 8000"}), now)


def test_page(now: BenchRecord, comparison: RecordComparison) -> None:
    page = bench_page(now, comparison)
    for words in (
        "a result was wrong or a path failed",
        "3 TB/s",
        "800 TFLOP/s",
        ">250.0<",
        ">1.25x<",  # of the floor
        ">0.50x<",  # over the best peer
        "the result is wrong: &lt;b&gt;0.3&lt;/b&gt;",
        "RuntimeError: no",
        "absent: the package vllm is not installed",
        "GPU 8000",
        "+25.0 %",
        "0123abc and changes",
        "SM 1980.0 of 1980.0 MHz",
    ):
        assert words in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count("<figure>") == 2


def test_page_of_an_unfinished_run_without_a_comparison() -> None:
    page = bench_page(record(row(), complete=False))
    assert "This run was not finished" in page
    assert "Compared with" not in page
    assert "a result was wrong" not in page


def test_pictures(now: BenchRecord) -> None:
    for chart in charts_of(now):
        root = ElementTree.fromstring(chart_svg(chart))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "w8a16 fragment" in "".join(root.itertext())


def test_png(now: BenchRecord) -> None:
    pytest.importorskip("matplotlib")
    for chart in charts_of(now):
        assert chart_png(chart).startswith(b"\x89PNG")


def test_console(now: BenchRecord, comparison: RecordComparison) -> None:
    console = Console(file=io.StringIO(), width=120)
    print_record(now, comparison, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "minimax-m3-ep8: H=6144 I=3072 L=16 of E=128 K=4, on GPU 9000",
        "roofs, measured: memory read 3 TB/s, bf16 matmul 800 TFLOP/s, fp32 matmul 50 TFLOP/s",
        "WRONG",
        "FAIL: bf16 dense, T=64, uniform: the result is wrong: <b>0.3</b>",
        "failed: transformers eager bf16, T=64, uniform: RuntimeError: no",
        "absent: vllm: the package vllm is not installed",
        "it is from another device, GPU 8000",
        "slower",
        "1 of 4 rows did not change by more than the noise",
    ):
        assert words in text
    (line,) = [line for line in text.splitlines() if "w8a16 fragment" in line and "1.25x" in line]
    assert line.split() == [
        "64",
        "w8a16",
        "fragment",
        "250.0",
        "249.5..250.5",
        "1.25x",
        "2.40",
        "14.4",
        "0.50x",
        "3.0e-03",
    ]
