"""Part ``trace``: vLLM's own profiler records a few decode steps of a server without epfuse and of one with it."""

from __future__ import annotations

import json
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.serve_on_gpu.answers import PAIR_SECONDS, Running, serving_both
from tools.serve_on_gpu.arms import ServerArm, Workplace
from tools.serve_on_gpu.parts import Folder, Outcome, TimeBudget, say
from tools.serve_on_gpu.servers import complete, post

from epfuse.serving.server import ServerFault

PROMPT = 128
SETTLE = 1.5
"""Seconds until all requests of a point decode."""


@dataclass(frozen=True)
class Wanted:
    """What is recorded.

    Attributes:
        concurrency: requests in flight, all of them decoding.
        steps: of the engine.
        answer: tokens of each request; long enough that none ends while the steps are recorded.
    """

    concurrency: int
    steps: int = 6
    answer: int = 700


def run(place: Workplace, wanted: Wanted, folder: Folder, budget: TimeBudget, facts: dict[str, Any]) -> Outcome:
    """A server of each arm side by side, one recorded after the other; the traces lie in ``traces`` of the workplace.

    Args:
        place: where they run; its arguments say how much memory each takes.
        wanted: the point.
        folder: gets a record of each.
        budget: of the part.
        facts: of the machine.
    """
    outcome = Outcome()
    if all(folder.has("trace", number, arm) for number, arm in enumerate(ServerArm, 1)):
        return outcome
    at = {arm: place.path / "traces" / f"{folder.label}-{arm}" for arm in ServerArm}
    for each in at.values():
        shutil.rmtree(each, ignore_errors=True)  # what an earlier call left unfinished is no trace of this server
    about = {"model": place.served, "wanted": asdict(wanted), "facts": facts}
    records: dict[ServerArm, dict[str, Any]] = {arm: {"complete": False, **about} for arm in ServerArm}
    failure: dict[str, Any] = {}

    def keep() -> None:
        for number, (arm, record) in enumerate(records.items(), 1):
            folder.keep("trace", number, arm, record | failure)

    with (
        outcome.attempt("traces", failure, keep),
        budget.work("a pair of servers", PAIR_SECONDS),
        serving_both(place, "trace", budget, lambda arm: _profiled(at[arm], wanted.steps)) as running,
    ):
        for arm, server in running.items():
            server.during(lambda server=server: _recorded(server, wanted))
            if not (files := sorted(file.name for file in at[arm].rglob("*.json.gz"))):
                raise ServerFault(f"the profiler left no trace in {at[arm]}")
            records[arm] |= {"complete": True, "traces": files}
            say(f"trace of {arm}: {', '.join(files)}")
    return outcome


def _profiled(at: Path, steps: int) -> tuple[str, str]:
    """Arguments of a server whose profiler records so many steps of its engine and writes them into a folder."""
    settings = {"profiler": "torch", "torch_profiler_dir": str(at), "torch_profiler_with_stack": False,
                "torch_profiler_dump_cuda_time_total": False, "ignore_frontend": True,
                "max_iterations": steps}  # fmt: skip
    return "--profiler-config", json.dumps(settings)


def _recorded(running: Running, wanted: Wanted) -> None:
    draw = random.Random(11)
    prompts = [[draw.randrange(2, 8192) for _ in range(PROMPT)] for _ in range(wanted.concurrency)]
    with ThreadPoolExecutor(wanted.concurrency) as pool:
        for answer in (32, wanted.answer):  # the first round warms the server up
            asked = [pool.submit(complete, running.port, running.model, prompt, answer) for prompt in prompts]
            if answer == wanted.answer:
                time.sleep(SETTLE)
                for path in ("/start_profile", "/stop_profile"):
                    post(running.port, path, None)
                    time.sleep(SETTLE)
            for each in asked:
                each.result()
