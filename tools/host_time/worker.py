"""Measures one kind of calls of the epfuse that is on the path; a process of `tools.host_time`.

It says a line of JSON when it is ready, and one for each line that it is given, until there are no more. It uses what
every version of epfuse has.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

import epfuse
from epfuse import ExpertMap, ExpertWeights, Path, Scratch, fused_experts, scratch_size
from epfuse.target import Target

CALLS, BURSTS = 20, 25
"""Calls between two waits for the device: what they launch fits the driver's queue."""
SIZES = {"minimax-m3-ep8": (16, 3072, 6144, 128, 4), "small": (4, 256, 512, 32, 4)}
"""L, I, H, E, K."""
RANKS = 8


def call_of(layer: str, path: Path, tokens: int, brings_memory: bool, device: torch.device) -> Callable[[], Any]:
    """A call on weights without meaning: zeros, at sizes where each kernel of the path runs."""
    local, intermediate, hidden, experts, top_k = SIZES[layer]

    def stack(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.zeros(local, rows, columns, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        return codes, torch.full((local, rows, columns // 32), 120, dtype=torch.uint8, device=device)

    weights = ExpertWeights.mxfp8(*stack(2 * intermediate, hidden), *stack(hidden, intermediate))
    weights = weights.prepare(Target.SM90, path)
    x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device=device)
    ids = torch.arange(tokens * top_k, dtype=torch.int32, device=device).remainder(experts).view(tokens, top_k)
    factors = torch.ones(tokens, top_k, device=device)
    expert_map = ExpertMap.contiguous(experts, RANKS, 3, device=device)
    more: dict[str, Any] = {}
    if brings_memory:
        size = scratch_size(path, tokens, top_k, hidden, intermediate)
        more = {
            "out": torch.empty_like(x),
            "scratch": Scratch(*(x.new_empty(elements) for elements in (size.y, size.routed))),
        }
    return lambda: fused_experts(x, weights, factors, ids, expert_map, path=path, **more)


def python_calls(call: Callable[[], Any]) -> int:
    """Functions in Python that one call enters."""
    entered = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event == "call"

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered - 1  # the lambda


def microseconds(call: Callable[[], Any], wait: Callable[[], None]) -> float:
    """Of the host for one call, the median of bursts."""
    found = []
    for _ in range(BURSTS):
        wait()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - begin) / CALLS * 1e6)
    wait()
    return statistics.median(found)


def main() -> None:
    """Arguments: path, tokens, "own" or "brought" memory, "gpu" or "stub"."""
    path, tokens, memory, where = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    stubbed = where == "stub"
    if stubbed:
        from tools.host_time.stub import stub_gpu

        context: Any = stub_gpu()
    else:
        context = nullcontext()
    device = torch.device("cpu") if stubbed else torch.device("cuda", 0)
    wait = (lambda: None) if stubbed else torch.cuda.synchronize
    layer = "small" if stubbed else "minimax-m3-ep8"
    with context, torch.inference_mode():
        call = call_of(layer, path, tokens, memory == "brought", device)
        for _ in range(5):
            call()
        wait()
        ready = {"python_calls": python_calls(call), "layer": layer, "epfuse": epfuse.__file__}
        print(json.dumps(ready), flush=True)
        for _ in sys.stdin:
            print(json.dumps({"us": microseconds(call, wait)}), flush=True)


if __name__ == "__main__":
    main()
