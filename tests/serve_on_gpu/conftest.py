"""Stubs in the place of vLLM."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tools.serve_on_gpu import answers, arms, offline, servers

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (arms, offline):
        monkeypatch.setattr(module, "VLLM", (sys.executable, str(HERE / "stub_vllm.py")))
    monkeypatch.setattr(servers, "BENCH", (sys.executable, str(HERE / "stub_bench.py")))
    monkeypatch.setattr(arms, "OF_THE_MACHINE", ("STUB_", "NCCL_"))
    for module in (servers, answers):
        monkeypatch.setattr(module, "READY", 60.0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder
