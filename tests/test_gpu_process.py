"""A process that loses the GPU names the test, and runs no other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import gpu_process

CONFTEST = """
from tests import gpu_process
from tests.gpu_process import pytest_runtest_makereport, pytest_runtest_setup, pytest_runtest_teardown

answer = ""
gpu_process.device_error = lambda: answer
"""
TESTS = """
import pytest
import conftest

def test_fine():
    pass

def test_writes_where_it_must_not():
    conftest.answer = "RuntimeError: CUDA error: an illegal memory access was encountered"

@pytest.fixture
def weights():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_after(weights):
    pass
"""


def test_the_first_test_is_named_and_the_rest_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_some.py").write_text(TESTS)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "."],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"1 failed, 1 passed, 1 skipped", done.stdout), done.stdout
    assert "test_writes_where_it_must_not (call) is the first after which the GPU answers: RuntimeError" in done.stdout
    assert re.search(r"SKIPPED.*this process lost the GPU in test_some.py::test_writes_where", done.stdout)


def test_too_many_processes_for_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40 << 30, 143 << 30))
    option = SimpleNamespace(numprocesses=15)
    session = SimpleNamespace(config=SimpleNamespace(option=option))
    with pytest.raises(pytest.UsageError, match=r"40.0 GiB of the GPU's memory are free; 15 processes .* take -n 8"):
        gpu_process.pytest_sessionstart(session)
    option.numprocesses = None
    gpu_process.pytest_sessionstart(session)
