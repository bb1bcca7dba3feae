"""Part ``serve``: new servers, with epfuse and without in turn, each from its first request to its warm figures."""

from __future__ import annotations

import http.client
import json
import random
import re
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tools.serve_on_gpu import metrics
from tools.serve_on_gpu.arms import ServerArm, Workplace, compiled_since, last_option, what_the_log_says
from tools.serve_on_gpu.bench import ServingBench
from tools.serve_on_gpu.parts import Folder, Outcome, TimeBudget, say

from epfuse.errors import ConfigError
from epfuse.serving.point import Client
from epfuse.serving.server import Server, ServerFault, ask, free_port

LENGTHS = (5, 17, 64, 300, 1000, 3000)
"""Prompt tokens of the first requests, over and over."""
FIRST, ANSWER = 12, 8
"""How many there are, and tokens of each answer."""
BENCH = (sys.executable, "-m", "tools.serve_on_gpu.bench")
READY, STOP, PATIENCE = 420.0, 30.0, 120.0
COLD_SECONDS, WARM_SECONDS = 140.0, 100.0
"""What a server with its points is taken to need before one has been seen."""
POINT = re.compile(r"(\d+)/(\d+)@(\d+(?:,\d+)*)")
KEPT = (
    "completed",
    "failed",
    "duration",
    "total_token_throughput",
    "output_throughput",
    *(f"{what}_{name}_ms" for name in ("ttft", "tpot", "itl") for what in ("mean", "median", "p99")),
)


@dataclass(frozen=True)
class Load:
    """A point.

    Attributes:
        isl, osl: tokens of a request.
        concurrency: requests in flight.
        new: whether it is measured before anything warmed the server up but its first requests.
        waves: requests over concurrency.
    """

    isl: int
    osl: int
    concurrency: int
    new: bool
    waves: int = 3

    @property
    def client(self) -> Client:
        """For `ServingBench`; a new server gets no requests beforehand that are not counted."""
        return Client(
            prompts=max(4, self.waves * self.concurrency),
            concurrency=self.concurrency,
            warmups=0 if self.new else min(self.concurrency, 16),
            isl=self.isl,
            osl=self.osl,
            shortest_share=1.0,
        )


def parse_loads(text: str, new: bool, waves: int) -> list[Load]:
    """Points as ``128/256@64,256 1024/1024@1``: input / output @ concurrencies.

    Raises:
        ConfigError: it is not written so.
    """
    found = []
    for word in text.split():
        match = POINT.fullmatch(word)
        if match is None:
            raise ConfigError(f"a point is {word!r}; one is written INPUT/OUTPUT@CONCURRENCY[,CONCURRENCY]")
        found += [Load(int(match[1]), int(match[2]), int(each), new, waves) for each in match[3].split(",")]
    if any(min(load.isl, load.osl, load.concurrency) < 1 for load in found):
        raise ConfigError(f"points are {text!r}; every number of one must be 1 or more")
    return found


@dataclass(frozen=True)
class WantedServer:
    """A server of the sequence: which arm, and whether its caches are emptied before."""

    arm: ServerArm
    cold: bool


def parse_servers(text: str) -> list[WantedServer]:
    """``none,epfuse:cold,...``.

    Raises:
        ConfigError: a word is no arm.
    """
    found = []
    for word in text.split(","):
        name, colon, how = word.partition(":")
        if name not in list(ServerArm) or (colon and how != "cold"):
            raise ConfigError(f"a server is {word!r}; one is none or epfuse, with :cold if it must find no caches")
        found.append(WantedServer(ServerArm(name), bool(colon)))
    return found


def run(
    place: Workplace,
    folder: Folder,
    wanted: Sequence[WantedServer],
    loads: Sequence[Load],
    bench: ServingBench,
    budget: TimeBudget,
    facts: dict[str, Any],
) -> Outcome:
    """All servers of a sequence that are not done yet.

    Args:
        place: where they run.
        folder: gets a record of each.
        wanted: in their order.
        loads: of each server; those of a new one come first.
        bench: measures them.
        budget: of the part.
        facts: of the machine, for the records.
    """
    outcome = Outcome()
    for number, server in enumerate(wanted, 1):
        if folder.has("serve", number, server.arm):
            continue
        if server.cold:
            place.empty(server.arm)
        cold = not place.has_cache(server.arm)
        record: dict[str, Any] = {"complete": False, "model": place.served, "cold": cold, "facts": facts, "points": []}
        keep = partial(folder.keep, "serve", number, server.arm, record)
        with (
            outcome.attempt(f"server {number} ({server.arm})", record, keep, " and those after it"),
            budget.work("a server without caches" if cold else "a server", COLD_SECONDS if cold else WARM_SECONDS),
        ):
            say(f"server {number} of {len(wanted)}: {server.arm}, caches {'empty' if cold else 'filled'}")
            _one(place, folder, number, server.arm, loads, bench, budget, record)
            record["complete"] = True
        if outcome.left:
            break
    return outcome


def _one(place: Workplace, folder: Folder, number: int, arm: ServerArm, loads: Sequence[Load], bench: ServingBench,
         budget: TimeBudget, record: dict[str, Any]) -> None:  # fmt: skip
    logs = place.path / "logs" / f"{folder.label}-{number:02d}-{arm}"
    logs.mkdir(parents=True, exist_ok=True)
    compiles = logs / f"compiles-{secrets.token_hex(4)}"
    model, port = str(place.folder), free_port()
    task = place.serve(arm, port, compiles)
    server = Server(task, logs / "server.log", port, secrets.token_hex(16), look=0.2)
    try:
        record["ready_s"] = round(server.wait_ready(min(READY, budget.left), model, budget), 1)
        ready = time.time()
        record |= what_the_log_says(logs / "server.log", arm)
        record["first"] = server.during(lambda: first_requests(port, model), budget)
        record["compiles_by_first"] = compiled_since(compiles, ready)
        say(f"ready after {record['ready_s']} s, first requests {record['first']['seconds']} s")
        for load in sorted(loads, key=lambda load: not load.new):
            result = logs / f"{'new' if load.new else 'warm'}-{load.isl}-{load.osl}-{load.concurrency}.json"
            before = metrics.phases(metrics.read(port))
            seen = server.during(lambda load=load, at=result: bench.measure(load.client, model, port, at), budget)
            point = {"isl": load.isl, "osl": load.osl, "concurrency": load.concurrency, "new": load.new}
            point |= {key: round(seen[key], 4) for key in KEPT if key in seen}
            point["engine"] = metrics.means(before, metrics.phases(metrics.read(port)))
            record["points"].append(point)
            say(
                f"{'new ' if load.new else 'warm'} c{load.concurrency}: TPOT {seen.get('median_tpot_ms', 0):.3f} ms,"
                f" p99 TTFT {seen.get('p99_ttft_ms', 0):.0f} ms"
            )
            folder.keep("serve", number, arm, record)
        record["compiles"] = compiled_since(compiles, ready)
    finally:
        server.stop(STOP)
    if not record["fits"]:
        raise ServerFault(f"the server's log does not fit an arm {arm}: {record['said']}")


def check_lengths(loads: Sequence[Load], arguments: Sequence[str]) -> None:
    """Refuse a point that the server would refuse, before one is started.

    Args:
        loads: points.
        arguments: of ``vllm serve``, whose last ``--max-model-len`` counts; the server alone judges one that is no
            plain number, such as ``auto``.

    Raises:
        ConfigError: a request is longer than the server takes.
    """
    longest = last_option(arguments, "--max-model-len")
    for load in loads:
        if longest is not None and longest.isdecimal() and load.isl + load.osl > int(longest):
            raise ConfigError(
                f"a point is {load.isl}/{load.osl}@{load.concurrency}, {load.isl + load.osl} tokens a request; the"
                f" server takes {longest} (--max-model-len): make the request shorter, or give another limit in"
                " --serve-arguments"
            )


def first_requests(port: int, model: str) -> dict[str, Any]:
    """The first requests of a server, one after the other: seconds of each, tokens and their log probabilities.

    Raises:
        ServerFault: one is not answered.
    """
    draw = random.Random(7)
    seconds, answers = [], []
    for number in range(FIRST):
        prompt = [draw.randrange(2, 8192) for _ in range(LENGTHS[number % len(LENGTHS)])]
        begun = time.monotonic()
        answers.append(complete(port, model, prompt, ANSWER))
        seconds.append(round(time.monotonic() - begun, 4))
    return {"seconds": round(sum(seconds), 3), "each": seconds, "answers": answers}


def complete(port: int, model: str, prompt: list[int], tokens: int, **more: Any) -> list[tuple[str, float]]:
    """A greedy answer: its tokens with their log probabilities, nats.

    Raises:
        ServerFault: there is none.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    try:
        status, answer = ask(port, "POST", "/v1/completions", body | more, timeout=120)
        if status != 200:
            raise ServerFault(f"a request is answered with {status}: {answer[:200].decode(errors='replace')}")
        (choice,) = json.loads(answer)["choices"]
        found = zip(choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"], strict=True)
        return [(str(token), float(value)) for token, value in found]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ServerFault(f"a request has no answer that can be read: {error!r:.200}") from None


def post(port: int, path: str, body: Any) -> None:
    """A request that a server only has to accept.

    Raises:
        ServerFault: it does not.
    """
    try:
        status, answer = ask(port, "POST", path, body, PATIENCE)
    except (OSError, http.client.HTTPException) as error:
        raise ServerFault(f"{path} is not answered: {error!r:.200}") from None
    if status != 200:
        raise ServerFault(f"{path} is answered with {status}: {answer[:300].decode(errors='replace')}")


def bench_for(place: Workplace, logs: Path) -> ServingBench:
    """The process that measures: it loads none of the plugins."""
    task = place.task(ServerArm.NONE, BENCH, logs / "bench", VLLM_PLUGINS="")
    return ServingBench(task, logs / "bench.log")
