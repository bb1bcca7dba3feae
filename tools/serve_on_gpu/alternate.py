"""Part ``alternate``: a server without epfuse and one with it live side by side, and each point is measured in turn.

Both are started at once, so two servers take the time of one, and what is compared was measured seconds apart. The one
whose turn it is not has no request. How long they take to start says nothing here: they compile at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from tools.serve_on_gpu import metrics
from tools.serve_on_gpu.answers import PAIR_SECONDS, Running, serving_both
from tools.serve_on_gpu.arms import ServerArm, Workplace, what_the_log_says
from tools.serve_on_gpu.bench import ServingBench
from tools.serve_on_gpu.parts import Folder, Outcome, TimeBudget, say
from tools.serve_on_gpu.servers import KEPT, Load, first_requests

PREEMPTED = "num_preemptions_total"


def run(
    place: Workplace,
    loads: Sequence[Load],
    rounds: int,
    bench: ServingBench,
    folder: Folder,
    budget: TimeBudget,
    facts: dict[str, Any],
) -> Outcome:
    """Both servers and all rounds; what was measured when the time was over is kept.

    Args:
        place: where they run.
        loads: points.
        rounds: each point is measured so often in each server: without, with, with, without, and so on.
        bench: measures them.
        folder: gets a record of each arm.
        budget: of the part.
        facts: of the machine.
    """
    outcome = Outcome()
    if all(folder.has("alternate", 1, arm) for arm in ServerArm):
        return outcome
    records: dict[ServerArm, dict[str, Any]] = {
        arm: {"complete": False, "model": place.served, "facts": facts, "points": []} for arm in ServerArm
    }

    failure: dict[str, Any] = {}

    def keep() -> None:
        for arm, record in records.items():
            folder.keep("alternate", 1, arm, record | failure)

    with (
        outcome.attempt("servers side by side", failure, keep),
        budget.work("a pair of servers", PAIR_SECONDS),
        serving_both(place, "alternate", budget) as running,
    ):
        for arm, server in running.items():
            records[arm] |= what_the_log_says(server.log, arm)
            records[arm]["first"] = server.during(partial(first_requests, server.port, server.model))
        for load in loads:
            for number in range(rounds):
                for arm in list(ServerArm)[:: -1 if number % 2 else 1]:
                    point = _measured(running[arm], bench, load, number)
                    records[arm]["points"].append(point)
                    say(f"{arm} {load.isl}/{load.osl} c{load.concurrency}: TPOT {point['median_tpot_ms']:.3f} ms")
                keep()  # after each round, so what is kept has both servers' turns
        for record in records.values():
            record["complete"] = True
    return outcome


def _measured(server: Running, bench: ServingBench, load: Load, number: int) -> dict[str, Any]:
    result = server.log.parent / f"{load.isl}-{load.osl}-{load.concurrency}-{number}.json"
    before = _preempted(server)
    seen = server.during(lambda: bench.measure(load.client, server.model, server.port, result))
    about = {"isl": load.isl, "osl": load.osl, "concurrency": load.concurrency, "new": False, "round": number}
    after = _preempted(server)
    if before is not None and after is not None:
        about["preempted"] = after - before
    return about | {key: round(seen[key], 4) for key in KEPT if key in seen}


def _preempted(server: Running) -> int | None:
    """Requests so far that had to give up their keys and values: with a small ``--cache`` they spoil a figure.

    None where the server doesn't say: without statistics, or too busy to answer.
    """
    text = metrics.read(server.port)
    return round(metrics.total(text, PREEMPTED)) if f"vllm:{PREEMPTED}" in text else None
