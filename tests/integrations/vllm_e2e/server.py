"""`vllm serve` in a process group of its own, and questions to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START = 300
"""Seconds that a server may take until it answers; 40 on two cores."""
STOP = 30
ANSWER = 120
BENCH = 300

SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "EPFUSE_STRICT": "1",
}
COMMAND = str(Path(sys.executable).with_name("vllm"))


def environment(**settings: str) -> dict[str, str]:
    """This process's, without what decides about vLLM, Triton or epfuse, and with `SETTINGS` and ``settings``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EPFUSE_", "TRITON_", "VLLM_"))}
    return kept | SETTINGS | settings


@dataclass(frozen=True)
class Answer:
    """What a server said.

    Attributes:
        text: the new text.
        logprobs: of each of its tokens.
    """

    text: str
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        port: where it listens, on the loopback device.
        model: the checkpoint's directory, which is also the model's name.
        log_file: what its processes wrote.
    """

    port: int
    model: Path
    log_file: Path

    def log(self, word: str) -> list[str]:
        """The lines of the log so far that have ``word`` in them."""
        return [line for line in self.log_file.read_text(errors="replace").splitlines() if word in line]

    def complete(self, prompt: str, tokens: int) -> Answer:
        """Greedy decoding."""
        asked = {
            "model": str(self.model),
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            data=json.dumps(asked).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER) as response:
            (choice,) = json.load(response)["choices"]
        return Answer(choice["text"], tuple(choice["logprobs"]["token_logprobs"]))

    def bench(self, directory: Path, *arguments: str) -> dict[str, Any]:
        """The results of ``vllm bench serve``."""
        command = [COMMAND, "bench", "serve", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--model", str(self.model), "--save-result", "--result-dir", str(directory)]
        command += ["--result-filename", "bench.json", *arguments]
        subprocess.run(command, env=environment(), check=True, timeout=BENCH)
        found: dict[str, Any] = json.loads((directory / "bench.json").read_text())
        return found


@contextlib.contextmanager
def serve(model: Path, log_file: Path, *arguments: str, **settings: str) -> Iterator[Server]:
    """A server for as long as the block runs; nothing of it is left afterwards.

    Args:
        model: the checkpoint's directory.
        log_file: where its processes write.
        arguments: of ``vllm serve``.
        settings: environment variables.
    """
    server = Server(_free_port(), model, log_file)
    command = [COMMAND, "serve", str(model), "--host", "127.0.0.1", "--port", str(server.port)]
    command += ["--enforce-eager", "--max-model-len", "256", *arguments]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment(**settings), start_new_session=True
        )
    try:
        _wait(process, server)
        yield server
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], server: Server) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=5):
            return
        time.sleep(1)
    end = "\n".join(server.log("")[-40:])
    raise RuntimeError(f"vllm serve does not answer (exit code {process.poll()}):\n{end}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The whole group: first asked, then killed; workers outlive a server that dies."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
