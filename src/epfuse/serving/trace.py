"""One profiler trace of a running server, and what ``epfuse profile`` says of it."""

from __future__ import annotations

import http.client
import json
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from epfuse.errors import EpfuseError
from epfuse.report.write import write_atomic
from epfuse.serving.layout import LegFolder
from epfuse.serving.point import Client
from epfuse.serving.server import ask
from epfuse.serving.stream_load import TOKENS, request

STEPS = 16
"""Decode steps that a trace holds at least: output tokens of each of its requests."""
TRACE_PATIENCE = 600.0
"""Seconds that a server takes at most to write its traces; eight ranks take minutes."""
PROFILE_PATIENCE = 1200.0


class TraceFault(EpfuseError):
    """There is no trace, or nothing in it; the message says why.

    Fix: look into the server's log beside the point; then ``epfuse serve resume --again``.
    """


def server_arguments(folder: Path) -> tuple[str, ...]:
    """What ``vllm serve`` must be given so that it can be asked for a trace into ``folder``."""
    return ("--profiler-config", json.dumps({"profiler": "torch", "torch_profiler_dir": str(folder)}))


def take(port: int, model: str, client: Client, traces: Path, leg: LegFolder) -> None:
    """Trace some steps at the point's concurrency, keep the first rank's trace, write its profile beside it.

    Args:
        port: of the server.
        model: its name of the model.
        client: the point's load; lengths and concurrency are taken from it.
        traces: the folder that the server writes into.
        leg: gets ``trace.json.gz`` and ``profile.json``.

    Raises:
        TraceFault: no trace came, or nothing in it was recognised.
    """
    draw = random.Random(client.seed)
    prompts = [[draw.choice(TOKENS) for _ in range(client.isl)] for _ in range(client.concurrency)]
    _ask(port, "/start_profile")
    with ThreadPoolExecutor(client.concurrency) as pool:
        list(pool.map(lambda prompt: request("127.0.0.1", port, model, prompt, min(STEPS, client.osl)), prompts))
    _ask(port, "/stop_profile")
    found = sorted(traces.rglob("*.json.gz"), key=lambda file: ("rank0" not in file.name, file.name))
    if not found:
        raise TraceFault("the server wrote no trace")
    shutil.move(found[0], leg.trace)
    for rest in found[1:]:
        rest.unlink()
    argv = [sys.executable, "-m", "epfuse", "profile", str(leg.trace), "--json"]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROFILE_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        raise TraceFault(f"epfuse profile takes longer than {PROFILE_PATIENCE:.0f} s") from None
    if done.returncode:
        raise TraceFault(f"epfuse profile: {done.stderr.decode(errors='replace').strip()[-300:]}")
    write_atomic(leg.profile, done.stdout)


def _ask(port: int, path: str) -> None:
    try:
        status, answer = ask(port, "POST", path, timeout=TRACE_PATIENCE)
    except (OSError, http.client.HTTPException) as error:
        raise TraceFault(f"the server does not answer {path}: {error!r}") from None
    if status != 200:
        raise TraceFault(f"the server answers {path} with {status}: {answer[:200].decode(errors='replace')}")
