"""Kernels run compiled where there is a GPU and in Triton's interpreter elsewhere."""

from __future__ import annotations

import os
import signal

import pytest
import torch

# A shell's background job ignores Ctrl-C, and so would its children; tests interrupt themselves and others.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated: before any epfuse kernel is imported
    from tests import interpreter

    interpreter.install()
else:
    from tests.gpu_process import (  # noqa: F401 - hooks of pytest
        pytest_runtest_makereport,
        pytest_runtest_setup,
        pytest_runtest_teardown,
        pytest_sessionstart,
    )

DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("two_gpus") and torch.cuda.device_count() < 2:
            item.add_marker(pytest.mark.skip(reason="needs two GPUs"))
        elif item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def device() -> torch.device:
    """Where the kernels under test run."""
    return DEVICE
