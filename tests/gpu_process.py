"""Hooks of tests/conftest.py where there is a GPU: a process that loses it names the test, and memory is bounded.

A CUDA error stays: whatever the process asks of the GPU afterwards fails with it, and a process that fails at once
takes all tests that are left from those that could run them.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Generator
from dataclasses import dataclass

import pytest
import torch

GIB_OF_A_PROCESS = 4.5
"""Device memory that a process of the suite keeps, with its CUDA context of about 1 GiB; a few tests take 4 more."""
SECONDS_BEFORE_A_SKIP = 5.0


@dataclass
class Lost:
    """When this process lost the GPU; empty while it has it."""

    test: str = ""
    error: str = ""


lost = Lost()


def device_error() -> str:
    """What the device has to say to a wait for all that was launched; empty if it answers."""
    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:  # any: this is about a device in an unknown state
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse to begin where the processes don't fit the device's memory."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        return
    processes = int(getattr(session.config.option, "numprocesses", None) or 1)
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < processes * GIB_OF_A_PROCESS:
        raise pytest.UsageError(
            f"{free:.1f} GiB of the GPU's memory are free; {processes} processes need {GIB_OF_A_PROCESS} GiB each: take"
            f" -n {int(free / GIB_OF_A_PROCESS)}, or see what else runs there"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this process can't run, slowly: processes that can take the tests meanwhile."""
    if lost.test:
        if os.environ.get("PYTEST_XDIST_WORKER"):
            time.sleep(SECONDS_BEFORE_A_SKIP)
        pytest.skip(f"this process lost the GPU in {lost.test}: {lost.error}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A phase after which the device is lost has failed, whether or not the test saw it."""
    report = yield
    if lost.test:
        return report
    error = device_error()
    if error:
        lost.test, lost.error = item.nodeid, error
        seen = f"\n\n{report.longrepr}" if report.failed else ""
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} ({call.when}) is the first after which the GPU answers: {error}{seen}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, None, None]:
    """After the last test of a file give back what torch keeps for another tensor."""
    yield
    if (nextitem is None or nextitem.path != item.path) and not lost.test and torch.cuda.is_initialized():
        gc.collect()
        if not device_error():
            torch.cuda.empty_cache()
