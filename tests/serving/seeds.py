"""How many seeds of a simulation are run."""

from __future__ import annotations

import os


def seeds(few: int, many: int) -> range:
    """``few`` of them by default; ``many`` with EPFUSE_SERVE_SEEDS=all."""
    return range(many if os.environ.get("EPFUSE_SERVE_SEEDS") == "all" else few)
