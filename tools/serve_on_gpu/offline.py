"""Part ``offline``: ``vllm bench throughput``, with epfuse and without in turn, each run a process of its own."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

from tools.serve_on_gpu.arms import VLLM, Workplace, compiled_since, what_the_log_says
from tools.serve_on_gpu.parts import Folder, Outcome, TimeBudget, say
from tools.serve_on_gpu.servers import WantedServer

from epfuse.input_file import read_object
from epfuse.serving.client import run_client
from epfuse.serving.load import LoadFault

COLD_SECONDS, WARM_SECONDS = 115.0, 55.0
"""What a run is taken to need before one has been seen: as long as a server of this model until it is ready."""


def run(
    place: Workplace,
    folder: Folder,
    wanted: list[WantedServer],
    sizes: tuple[int, int, int],
    budget: TimeBudget,
    facts: dict[str, Any],
) -> Outcome:
    """All runs of a sequence that are not done yet.

    Args:
        place: where they run.
        folder: gets a record of each.
        wanted: in their order.
        sizes: prompts, input and output tokens of each.
        budget: of the part.
        facts: of the machine.
    """
    outcome = Outcome()
    for number, one in enumerate(wanted, 1):
        if folder.has("offline", number, one.arm):
            continue
        if one.cold:
            place.empty(one.arm)
        cold = not place.has_cache(one.arm)
        ran = sum(before.arm is one.arm for before in wanted[:number])
        record: dict[str, Any] = {"complete": False, "model": place.served, "cold": cold, "facts": facts, "run": ran}
        keep = partial(folder.keep, "offline", number, one.arm, record)
        with (
            outcome.attempt(f"offline run {number} ({one.arm})", record, keep, " and those after it"),
            budget.work("a cold run" if cold else "a run", COLD_SECONDS if cold else WARM_SECONDS),
        ):
            say(f"offline run {number} of {len(wanted)}: {one.arm}, caches {'empty' if cold else 'filled'}")
            record |= _one(place, folder, number, one, sizes, budget)
            say(f"{record['tokens_per_second']:.0f} tokens/s")
        if outcome.left:
            break
    return outcome


def _one(place: Workplace, folder: Folder, number: int, one: WantedServer, sizes: tuple[int, int, int],
         budget: TimeBudget) -> dict[str, Any]:  # fmt: skip
    logs = place.path / "logs" / f"{folder.label}-offline-{number:02d}-{one.arm}"
    logs.mkdir(parents=True, exist_ok=True)
    result, log = logs / "result.json", logs / "run.log"
    result.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    prompts, isl, osl = (str(size) for size in sizes)
    argv = (*VLLM, "bench", "throughput", "--model", str(place.folder), *place.engine_arguments)
    argv += ("--dataset-name", "random", "--random-input-len", isl, "--random-output-len", osl)
    argv += ("--num-prompts", prompts, "--output-json", str(result))
    compiles = logs / f"compiles-{os.getpid()}"
    task = place.task(one.arm, argv, compiles)
    begun, since = time.monotonic(), time.time()
    run_client(task, log, "vllm bench throughput", budget, 0.5)
    found = read_object(result, "result of vllm bench throughput")
    try:
        figures = {key: float(found[key]) for key in ("tokens_per_second", "elapsed_time", "total_num_tokens")}
    except (LookupError, TypeError, ValueError):
        raise LoadFault(f"{result.name} has not the figures of vllm bench throughput") from None
    said = what_the_log_says(log, one.arm)
    if not said["fits"]:
        raise LoadFault(f"the log does not fit an arm {one.arm}: {said['said']}")
    compiled = compiled_since(compiles, since)
    return {**figures, **said, "seconds": round(time.monotonic() - begun, 1), "compiles": compiled, "complete": True}
