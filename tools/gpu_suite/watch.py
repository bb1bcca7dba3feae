"""pytest plugin: what a test that failed left behind, one JSON line each, and each test's largest memory.

A CUDA error is sticky: every later test of the same process fails too. So the first error of a process is what counts,
and whether the device still answers after it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = "EPFUSE_GPU_SUITE"
"""Environment variable: the folder that gets a file of each process."""


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
    before = torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        entry = {"test": item.nodeid, "seconds": round(time.perf_counter() - start, 2)}
        _note(
            entry
            | {
                "peak_mib": torch.cuda.max_memory_allocated() >> 20,
                "reserved_mib": torch.cuda.memory_reserved() >> 20,
                "reserved_before_mib": before >> 20,
            }
        )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Note an error, and whether the device answers after it."""
    yield
    if call.excinfo is None or call.excinfo.errisinstance(pytest.skip.Exception):
        return
    free, total = (-1, -1)
    answer = _device_answers()
    if answer is None:
        free, total = torch.cuda.mem_get_info()
    _note(
        {
            "failed": item.nodeid,
            "when": call.when,
            "error": call.excinfo.exconly()[:2000],
            "device_after": answer or "answers",
            "free_mib": free >> 20,
            "total_mib": total >> 20,
        }
    )
