"""Most of these tests need an SGLang on the path: `make test-sglang` unpacks the tested releases and runs with each."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

HAVE_SGLANG = importlib.util.find_spec("sglang") is not None
if not HAVE_SGLANG:
    collect_ignore = [
        "deployment.py",
        "test_dense.py",
        "test_experts.py",
        "test_explain.py",
        "ep_entries.py",
        "test_hooks.py",
        "test_parallel.py",
        "test_reload.py",
        "test_sglang_on_gpu.py",
        "test_warm.py",
        "warm_entries.py",
    ]
else:
    # torchvision declares these in a library that needs CUDA's; SGLang only imports it
    _TORCHVISION = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _TORCHVISION.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def fresh_environment(monkeypatch):
    """No variable of the developer's, and none read earlier, decides a test."""
    from epfuse.environment import environment

    for name in list(os.environ):
        if name.startswith(("EPFUSE_", "SGLANG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("EPFUSE_STRICT", "1")
    environment.cache_clear()
    yield
    environment.cache_clear()
