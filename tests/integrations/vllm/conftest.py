"""These tests need a vLLM on the path: `make test-vllm` unpacks the tested releases and runs them with each."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

HAVE_VLLM = importlib.util.find_spec("vllm") is not None
if not HAVE_VLLM:
    collect_ignore = [
        "patch/test_real_vllm.py",
        "test_apply.py",
        "test_data_parallel.py",
        "test_explain.py",
        "test_gpt_oss.py",
        "test_layer.py",
        "test_recipes.py",
        "test_refusals.py",
        "test_serve_on_gpu.py",
        "test_uninstall.py",
        "test_versions.py",
        "test_vllm_on_gpu.py",
    ]
elif not torch.cuda.is_available():
    # vLLM then keeps Triton although no driver is active, and the interpreter can run its kernels
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    os.environ.setdefault("HIP_VISIBLE_DEVICES", "")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm.platforms

    from tests.integrations.vllm.platform import PretendPlatform

    vllm.platforms._current_platform = PretendPlatform()


@pytest.fixture(autouse=True)
def fresh_environment(monkeypatch):
    """No variable of the developer's, and none read earlier, decides a test."""
    from epfuse.environment import environment

    for name in list(os.environ):
        if name.startswith("EPFUSE_"):
            monkeypatch.delenv(name)
    environment.cache_clear()
    yield
    environment.cache_clear()
