"""Part ``trace``: vLLM's own profiler records a few decode steps of a server without epfuse and of one with it."""

from __future__ import annotations

import json
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from tools.serve_on_gpu.answers import SECONDS, Running, serving
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
    """A server of each arm; each rank's trace lies in a folder ``traces`` of the workplace.

    Args:
        place: where they run.
        wanted: the point.
        folder: gets a record of each.
        budget: of the part.
        facts: of the machine.
    """
    outcome = Outcome()
    for number, arm in enumerate(ServerArm, 1):
        if folder.has("trace", number, arm):
            continue
        record: dict[str, Any] = {"complete": False, "model": place.served, "wanted": asdict(wanted), "facts": facts}
        at = place.path / "traces" / f"{folder.label}-{arm}"
        shutil.rmtree(at, ignore_errors=True)  # what an earlier call left unfinished is no trace of this server
        settings = {"profiler": "torch", "torch_profiler_dir": str(at), "torch_profiler_with_stack": False,
                    "torch_profiler_dump_cuda_time_total": False, "ignore_frontend": True,
                    "max_iterations": wanted.steps}  # fmt: skip
        arguments = ("--profiler-config", json.dumps(settings))
        with (
            outcome.attempt(f"trace of {arm}", record, partial(folder.keep, "trace", number, arm, record)),
            budget.work("a server", SECONDS),
            serving(place, arm, f"trace-{arm}", budget, *arguments) as running,
        ):
            running.during(lambda running=running: _recorded(running, wanted))
            if not (files := sorted(file.name for file in at.rglob("*.json.gz"))):
                raise ServerFault(f"the profiler left no trace in {at}")
            record |= {"complete": True, "traces": files}
            say(f"trace of {arm}: {', '.join(files)}")
        if outcome.left:
            break
    return outcome


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
