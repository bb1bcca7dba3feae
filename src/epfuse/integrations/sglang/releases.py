"""Which SGLang is installed, and which releases epfuse was tested with."""

from __future__ import annotations

from pathlib import Path

from epfuse.integrations.installed import package_of, version_of

TESTED = ("0.5.22", "0.5.23")
"""A release joins when `make test-sglang` passes with it, and `interfaces.json` has it."""


def installed() -> str:
    """The installed SGLang's version, for messages; ``unknown`` if it has no metadata."""
    return version_of("sglang")


def package() -> Path | None:
    """The directory of the SGLang that this interpreter imports, found without importing it; None without one."""
    return package_of("sglang")
