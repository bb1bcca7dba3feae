"""A plugin of vLLM for measuring: a line of JSON for every kernel that Triton compiles or takes from a folder.

And dummy weights that are numbers (`dummy`), and where `memory.EVERY` is set what torch holds of the GPU (`memory`).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from tools.serve_on_gpu import dummy, memory

FOLDER = "SERVE_ON_GPU_COMPILES"
"""Environment variable: the folder that gets a file of each process."""


def register() -> None:
    """Listen, where there is Triton and `FOLDER` is set; the listener that is there already is called too."""
    place = os.environ.get(FOLDER)
    dummy.use()
    if place is not None and memory.EVERY in os.environ:
        memory.sample_into(Path(place), float(os.environ[memory.EVERY]))
    try:
        from triton import knobs
    except ImportError:
        return
    if place is None or getattr(knobs.compilation.listener, "writes_to", None) == place:
        return
    knobs.compilation.listener = _listener(place, knobs.compilation.listener)


def _listener(place: str, other: Any) -> Any:
    out = (Path(place) / f"compiles-{os.getpid()}.jsonl").open("a", buffering=1, encoding="utf-8")

    def listen(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        out.write(json.dumps(described(src, metadata_group, times, cache_hit)) + "\n")
        if other is not None:
            other(src=src, metadata=metadata, metadata_group=metadata_group, times=times, cache_hit=cache_hit)

    listen.writes_to = place  # type: ignore[attr-defined]
    return listen


def described(src: Any, metadata_group: dict[str, str], times: Any, cache_hit: bool) -> dict[str, Any]:
    """A line: which kernel, what it was specialised for, where it lies, and how long that took.

    ``ours`` says whether the kernel is epfuse's.
    """
    function = getattr(src, "fn", None)
    module = str(getattr(function, "__module__", ""))
    took = times.ir_initialization + times.store_results + sum(us for _, us in times.lowering_stages)
    return {
        "time": round(time.time(), 3),
        "kernel": str(getattr(function, "__name__", None) or getattr(src, "name", "?")),
        "ours": module.split(".")[0] == "epfuse",
        "hit": bool(cache_hit),
        "us": int(took),
        "constants": {str(key): str(value)[:80] for key, value in (getattr(src, "constants", None) or {}).items()},
        "attributes": {str(key): str(value)[:80] for key, value in (getattr(src, "attrs", None) or {}).items()},
        "folder": os.path.dirname(next(iter(metadata_group.values()), "")),
    }
