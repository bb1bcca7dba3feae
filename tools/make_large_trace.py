"""Write a large trace for timing `epfuse profile`: a real step again and again.

    python tools/make_large_trace.py tests/data/mi300x-vllm-decode-gptoss.trace.json.gz large.json --bytes 1e9
    /usr/bin/time -v epfuse profile large.json

As it is, the step's host side is Python stacks for the most part. With --eager it has kernels only, and one launching
call for each: the most that a trace of this size can make the profile keep.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from epfuse.report.write import replacing

STEP_US = 30_000
"""From one copy's events to the next one's; longer than the step."""
CORRELATIONS = 1_000_000
"""Ids that a copy may use."""
LONGEST_NAME = 200


def moved(event: dict[str, Any], copy: int) -> dict[str, Any]:
    """The event, later, and with a correlation id of its own."""
    new = event | {"ts": event["ts"] + copy * STEP_US}
    if "correlation" in event.get("args", {}):
        new["args"] = event["args"] | {"correlation": event["args"]["correlation"] + copy * CORRELATIONS}
    return new


def eager(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The step's annotation, and each kernel with a launching call."""
    step = next(event for event in events if event.get("cat") == "user_annotation")
    yield step
    for index, event in enumerate(event for event in events if event.get("cat") == "kernel"):
        launch = {"ph": "X", "cat": "cuda_runtime", "name": "hipLaunchKernel", "pid": step["pid"], "tid": step["tid"]}
        yield launch | {"ts": step["ts"] + 5 * index, "dur": 4.5, "args": {"cid": 107, "correlation": index}}
        yield event | {"name": event["name"][:LONGEST_NAME], "args": event["args"] | {"correlation": index}}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="trace of one step, .json.gz")
    parser.add_argument("target", type=Path)
    parser.add_argument("--bytes", type=float, default=1e9, help="size to reach")
    parser.add_argument("--eager", action="store_true", help="kernels and launching calls only")
    arguments = parser.parse_args()
    with gzip.open(arguments.source) as file:
        trace = json.load(file)
    events = trace.pop("traceEvents")
    if arguments.eager:
        events = list(eager(events))
    copy = 0
    with replacing(arguments.target) as out:
        out.write(f'{json.dumps(trace, indent=2)[:-2]},\n  "traceEvents": ['.encode())
        while out.tell() < arguments.bytes:
            lines = [json.dumps(moved(event, copy), indent=2) for event in events]
            out.write(((",\n" if copy else "\n") + ",\n".join(lines)).encode())
            copy += 1
        out.write(b"\n]}\n")
    print(f"{arguments.target}: {arguments.target.stat().st_size} bytes, {copy} steps, {copy * len(events)} events")


if __name__ == "__main__":
    main()
