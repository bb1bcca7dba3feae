"""Part ``endure``: thousands of requests of mixed lengths, some broken off, with too little memory for all of them.

Prefixes are shared, prompts are cut into chunks, requests are preempted. Afterwards the server must say what it said
before, hold no more memory than when it was warm, and have compiled nothing. Of the GPU's memory what tensors take
counts (`memory`), looked at while no request is there: what torch's allocator keeps beyond that follows the sizes that
batches happen to have. It is reported, and so is what the driver says, to which other programs on the GPU add.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tools.serve_on_gpu import memory as torch_memory
from tools.serve_on_gpu import metrics
from tools.serve_on_gpu.answers import Running, serving
from tools.serve_on_gpu.arms import ServerArm, Workplace, compiled_since
from tools.serve_on_gpu.parts import Folder, Outcome, TimeBudget, say
from tools.serve_on_gpu.servers import STOP, complete

from epfuse.serving.node import Gpus
from epfuse.serving.server import ask, marked_processes

LONGEST_PROMPT, LONGEST_ANSWER = 2000, 64
SHARED, BROKEN = 0.3, 0.03
"""Shares of requests that begin alike, and whose client goes away."""
AT_ONCE = 64
START_SECONDS = 120.0
ANSWER_SECONDS = 120.0
PROBE_SECONDS = 15.0
"""The questions at the end are taken to need so long."""
PROBES = 6
GPU_MIB, HOST_MIB = 64.0, 512.0
"""What may be more at the end than after the first tenth: of tensors on the GPU, of the processes on the host."""
SAMPLE_SECONDS = 0.5
SETTLE_SECONDS = 1.5
"""Until a sample is of a server without requests."""
SERIES = 60
"""Samples of the whole run that the record keeps."""
ARGUMENTS = ("--enable-prefix-caching", "--num-gpu-blocks-override", "128", "--max-num-seqs", "64")
"""Blocks of 128 tokens, for 64 requests that would hold 171 in the mean: some 45 run at a time, and about one in 80 is
preempted, where one grows into another block and none is free. With 256, on an H200, none was; with fewer it takes
longer: 96 blocks need a third more steps."""


@dataclass
class Tally:
    """How requests ended."""

    good: int = 0
    broken: int = 0
    wrong: list[str] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)


def run(
    place: Workplace,
    requests: int,
    folder: Folder,
    budget: TimeBudget,
    facts: dict[str, Any],
    arm: ServerArm = ServerArm.EPFUSE,
) -> Outcome:
    """A server, its requests and its checks; as many requests as there is time for count too.

    Args:
        place: where it runs.
        requests: at the most.
        folder: gets a record.
        budget: of the part.
        facts: of the machine.
        arm: with epfuse or, to compare, without.
    """
    outcome = Outcome()
    if folder.has("endure", 1, arm):
        return outcome
    record: dict[str, Any] = {"complete": False, "model": place.served, "facts": facts}
    settings = {torch_memory.EVERY: str(SAMPLE_SECONDS)}
    with (
        outcome.attempt("the long run", record, partial(folder.keep, "endure", 1, arm, record)),
        budget.work("a server with its requests", START_SECONDS + 60),
        serving(place, arm, f"endure-{arm}", budget, *ARGUMENTS, **settings) as running,
    ):
        record |= _one(running, requests, budget)
    return outcome


def _one(running: Running, requests: int, budget: TimeBudget) -> dict[str, Any]:
    ready = time.time()
    before = running.during(lambda: probe(running, "before"))
    tally, memory, begun, longest = Tally(), [], time.monotonic(), 0.0
    for part in range(10):
        if budget.left < STOP + PROBE_SECONDS + SETTLE_SECONDS + 1.5 * longest:
            break
        since = time.monotonic()
        numbers = range(part * requests // 10, (part + 1) * requests // 10)
        running.during(lambda numbers=numbers: _send(running, numbers, tally))
        longest = max(longest, time.monotonic() - since)
        time.sleep(SETTLE_SECONDS)
        memory.append(memory_of(running))
        say(f"{tally.good} answered, {tally.broken} broken off, {len(tally.wrong)} wrong; {memory[-1]}")
    took = time.monotonic() - begun
    after = running.during(lambda: probe(running, "after"))
    preempted = round(metrics.total(metrics.read(running.port), "num_preemptions_total"))
    late = compiled_since(running.compiles, ready).get("ours after", {})
    findings = {
        "answers changed": before != after,
        f"{len(tally.wrong)} requests went wrong, first {tally.wrong[:1]}": bool(tally.wrong),
        "a process did not say what its tensors take": any("allocated" not in sample for sample in memory),
        "tensors on the GPU grew": grew(memory, "allocated", GPU_MIB),
        "the host's memory grew": grew(memory, "host_mib", HOST_MIB),
        "nothing was preempted": preempted == 0,
        f"kernels were compiled or loaded: {late}": bool(sum(late.values())),
        f"only {tally.good + tally.broken} of {requests} requests": tally.good + tally.broken < requests,
    }
    wrong = [words for words, found in findings.items() if found]
    words = f"{tally.good} answered, {tally.broken} broken off, {preempted} preempted in {took:.0f} s"
    return {
        "complete": True,
        "passed": not wrong,
        "reason": "; ".join([words, *wrong]),
        "answered": tally.good,
        "broken_off": tally.broken,
        "preempted": preempted,
        "seconds": round(took, 1),
        "memory": memory,
        "torch_memory": _series(running.compiles, ready, time.time()),
    }


def probe(running: Running, salt: str) -> list[Any]:
    """Answers that don't come out of the prefix cache: it is salted."""
    draw = random.Random(5)
    prompts = [[draw.randrange(2, 8192) for _ in range(length)] for length in (3, 40, 200, 700, 1500, 2000)[:PROBES]]
    return [complete(running.port, running.model, prompt, 16, cache_salt=salt) for prompt in prompts]


def _send(running: Running, numbers: range, tally: Tally) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda number: _request(running, number, tally), numbers))


def _request(running: Running, number: int, tally: Tally) -> None:
    draw = random.Random(number)
    length = round(LONGEST_PROMPT ** draw.random())  # as many of 1 to 10 tokens as of 100 to 1000
    shared = random.Random(1) if draw.random() < SHARED else draw
    prompt, tokens = [shared.randrange(2, 8192) for _ in range(length)], draw.randint(1, LONGEST_ANSWER)
    body = {"model": running.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    try:
        if draw.random() < BROKEN:
            _break_off(running.port, body, draw.uniform(0.0, 0.3))
            found = ""
        else:
            status, answer = ask(running.port, "POST", "/v1/completions", body, ANSWER_SECONDS)
            made = json.loads(answer)["usage"]["completion_tokens"] if status == 200 else None
            found = "" if made == tokens else f"request {number}: status {status}, {made} of {tokens} tokens"
            with tally.lock:
                tally.good += not found
                tally.wrong += [found] if found else []
            return
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        found = f"request {number}: {error!r:.100}"
    with tally.lock:
        tally.broken += not found
        tally.wrong += [found] if found else []


def _break_off(port: int, body: dict[str, Any], seconds: float) -> None:
    """Ask, and close the connection without waiting for the answer."""
    data = json.dumps({**body, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + data)
        connection.settimeout(max(seconds, 1e-3))
        with contextlib.suppress(TimeoutError):
            connection.recv(1)


def memory_of(running: Running) -> dict[str, float]:
    """MiB: what torch says in the server's processes, what the driver says of this process's GPUs, and on the host."""
    found = {"gpu_mib": used_on_gpus(), "host_mib": _resident(running.mark)}
    sample = torch_memory.at(torch_memory.read_samples(running.compiles), time.time())
    return found if sample is None else asdict(sample) | found


def used_on_gpus() -> float:
    """MiB in use on the GPUs that this process may use, whoever uses them."""
    visible = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.isdigit()]
    seen = [sample for sample in Gpus("nvidia").sample() if not visible or str(sample.gpu) in visible]
    return sum(sample.memory for sample in seen if sample.memory is not None)


def _resident(mark: str) -> float:
    resident = 0
    for pid in marked_processes(mark):
        with contextlib.suppress(OSError, ValueError, IndexError):
            resident += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    return round(resident / 2**20)


def _series(place: Path, begun: float, ended: float) -> list[dict[str, float]]:
    """What torch said during the run, evenly over its time; "seconds" since it began."""
    samples = torch_memory.read_samples(place)
    moments = [begun + (ended - begun) * step / SERIES for step in range(1, SERIES + 1)]
    taken = [(moment, torch_memory.at(samples, moment)) for moment in moments]
    return [{"seconds": round(moment - begun, 1), **asdict(one)} for moment, one in taken if one is not None]


def grew(memory: list[dict[str, float]], which: str, allowed: float) -> bool:
    """Whether the last sample is above the first, which is taken after a tenth of the requests, by more than that."""
    values = [sample[which] for sample in memory if which in sample]
    return len(values) > 1 and values[-1] - values[0] > allowed
