"""pytest plugin: what a test that failed left behind, one JSON line each, and each test's largest memory.

A CUDA error is sticky: every later test of the same process fails too. So the first error of a process is what counts,
and whether the device still answers after it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = "EPFUSE_GPU_SUITE"
"""Environment variable: the folder that gets a file of each process."""
REPEAT = "EPFUSE_GPU_SUITE_REPEAT"
"""Environment variable: how often each test runs."""
FENCED = "EPFUSE_GPU_SUITE_FENCED"
"""Environment variable: set if tensors end where mapped memory does (fence.py)."""

if os.environ.get(FENCED) and os.environ.get("PYTEST_XDIST_WORKER", "main") != "main":
    from tools.gpu_suite import fence

    fence.install()


def _has_statistics() -> bool:
    """Torch's own allocator counts; another one does not."""
    return torch.cuda.is_initialized() and not os.environ.get(FENCED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests, as often as asked for."""
    items[:] = items * int(os.environ.get(REPEAT, "1"))


def _note(entry: dict[str, Any]) -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    entry = {"time": round(time.time(), 2), "worker": worker, "pid": os.getpid()} | entry
    with (Path(os.environ[FOLDER]) / f"{worker}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _device_answers() -> str | None:
    """None, or the error that the device gives to a wait and a small sum."""
    try:
        torch.cuda.synchronize()
        torch.ones(8, device="cuda").sum().item()
    except Exception as error:  # any: this is about a device in an unknown state
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Note a test's time and largest memory."""
    before = torch.cuda.memory_reserved() if _has_statistics() else 0
    if _has_statistics():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        entry = {
            "test": item.nodeid,
            "seconds": round(time.perf_counter() - start, 2),
            "reserved_before_mib": before >> 20,
        }
        peak, reserved = (
            (torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()) if _has_statistics() else (0, 0)
        )
        _note(entry | {"peak_mib": peak >> 20, "reserved_mib": reserved >> 20})


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note a failure, also one that tests/gpu_process.py made of a passed test, and whether the device answers."""
    report = yield
    if report.failed:
        free, total = (-1, -1)
        answer = _device_answers()
        if answer is None:
            free, total = torch.cuda.mem_get_info()
        _note(
            {
                "failed": item.nodeid,
                "when": call.when,
                "error": (call.excinfo.exconly() if call.excinfo else str(report.longrepr))[:2000],
                "device_after": answer or "answers",
                "free_mib": free >> 20,
                "total_mib": total >> 20,
            }
        )
    return report
