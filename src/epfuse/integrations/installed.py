"""What is installed of a server, found without importing it."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def version_of(*distributions: str) -> str:
    """The version of the first that is installed, for messages; ``unknown`` if it has no metadata.

    Args:
        distributions: names under which the server is installed.
    """
    for name in distributions:
        try:
            found: str | None = version(name)
        except PackageNotFoundError:
            continue
        return found or "unknown"  # metadata may lack it
    return "unknown"


def package_of(module: str) -> Path | None:
    """The directory of the package that this interpreter would import; None without one.

    Args:
        module: its name.
    """
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a module that was put there without a spec
        return None
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None
