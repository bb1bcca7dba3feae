"""What a server says of itself at ``/metrics``: preemptions, and how long requests wait in the engine itself."""

from __future__ import annotations

import contextlib
import http.client
import re
from collections.abc import Mapping

from epfuse.serving.server import ask

PHASES = ("request_queue_time", "request_prefill_time", "time_to_first_token")
"""The first two are the engine's, from a request's arrival in it; the last is seen where answers go out to clients."""


def read(port: int) -> str:
    """Prometheus' text; empty where the server gives none."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        return ask(port, "GET", "/metrics", timeout=30)[1].decode(errors="replace")
    return ""


def total(text: str, name: str) -> float:
    """A counter's sum over all engines; 0 where there is none."""
    return sum(float(value) for value in re.findall(rf"^vllm:{name}(?:{{[^}}]*}})? ([\d.e+-]+)$", text, re.M))


def phases(text: str) -> dict[str, tuple[float, float]]:
    """Seconds and requests of each of `PHASES` since the server began."""
    return {name: (total(text, f"{name}_seconds_sum"), total(text, f"{name}_seconds_count")) for name in PHASES}


def means(before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Milliseconds of each phase per request that came in between; without those that none went through."""
    found = {}
    for name, (seconds, requests) in after.items():
        if (more := requests - before[name][1]) > 0:
            found[f"{name}_ms"] = round(1e3 * (seconds - before[name][0]) / more, 3)
    return found
