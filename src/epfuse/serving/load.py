"""A point's load: which command makes it, and what its result says.

``vllm bench serve`` and ``guidellm run`` are commands of the arm's environment. `epfuse.serving.stream_load` is the
harness' own, a process too, for servers beside which neither is installed. It leaves one JSON object with the keys that
``vllm bench serve --save-result --save-detailed`` has; guidellm's report is read as one (`epfuse.serving.guidellm`).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from epfuse.errors import EpfuseError
from epfuse.input_file import read_json
from epfuse.serving.guidellm import guidellm_command, in_vllms_words, is_report
from epfuse.serving.point import Client

LARGEST_RESULT = 1 << 30
"""Bytes; 2560 requests with 1024 intervals each take some 50 MiB."""


class LoadFault(EpfuseError):
    """A load ended without a result that counts; the message says why.

    Fix: look into the client's log beside the point; then ``epfuse serve resume --again``.
    """


def load_command(client: Client, model: str, host: str, port: int, result: Path) -> tuple[str, ...]:
    """The command that measures.

    Args:
        client: the load.
        model: the server's name of the model, and what its tokenizer is loaded from.
        host: of the server.
        port: of the server.
        result: where the result is to lie.
    """
    if client.tool == "vllm":
        return _vllm(client, model, host, port, result)
    if client.tool == "guidellm":
        return guidellm_command(client, model, host, port, result)
    argv = [*(client.command or (sys.executable, "-m", "epfuse.serving.stream_load"))]
    argv += ["--host", host, "--port", str(port), "--model", model, "--prompts", str(client.prompts)]
    argv += ["--concurrency", str(client.concurrency), "--warmups", str(client.warmups), "--seed", str(client.seed)]
    argv += ["--isl", str(client.isl), "--osl", str(client.osl), "--shortest-share", str(client.shortest_share)]
    return (*argv, "--result", str(result))


def _vllm(client: Client, model: str, host: str, port: int, result: Path) -> tuple[str, ...]:
    isl, ratio = client.vllm_lengths(client.isl)
    osl, _ = client.vllm_lengths(client.osl)
    argv = [*(client.command or ("vllm", "bench", "serve")), "--backend", "vllm", "--model", model]
    argv += ["--host", host, "--port", str(port), "--dataset-name", "random", "--random-input-len", str(isl)]
    argv += ["--random-output-len", str(osl), "--random-range-ratio", f"{ratio:g}", "--seed", str(client.seed)]
    argv += ["--num-prompts", str(client.prompts), "--max-concurrency", str(client.concurrency)]
    argv += ["--num-warmups", str(client.warmups)]
    argv += ["--request-rate", "inf" if client.request_rate is None else f"{client.request_rate:g}"]
    argv += ["--percentile-metrics", "ttft,tpot,itl,e2el"]
    argv += ["--metric-percentiles", ",".join(f"{share:g}" for share in client.percentiles)]
    argv += ["--ignore-eos"] if client.ignore_eos else []
    return (
        *argv,
        "--save-result",
        "--save-detailed",
        "--result-dir",
        str(result.parent),
        "--result-filename",
        result.name,
    )


def read_result(client: Client, result: Path) -> dict[str, float]:
    """The numbers of a result, if it counts.

    Args:
        client: the load that made it.
        result: what `load_command` was given.

    Returns:
        Every finite number of the result.

    Raises:
        LoadFault: there is none, it is torn or says nothing, or more requests failed than may.
    """
    content = _read(result)
    metrics = {
        name: float(value)
        for name, value in content.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    completed = metrics.get("completed")
    if completed is None:
        raise LoadFault(f"{result.name} does not say how many requests were completed")
    failed = client.prompts - completed
    if failed > client.most_failed * client.prompts or completed < 1:
        raise LoadFault(
            f"{failed:.0f} of {client.prompts} requests failed, more than {client.most_failed:.0%}:"
            f" {_first_error(content)}"
        )
    if not metrics.get("total_output_tokens") or not metrics.get("duration"):
        raise LoadFault(f"{result.name} has no output tokens, or took no time: nothing was measured")
    return metrics


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, "result", LARGEST_RESULT)
        if isinstance(content, dict) and is_report(content):
            content = in_vllms_words(content, path.name)
    except EpfuseError as error:
        raise LoadFault(str(error)) from None
    if not isinstance(content, dict):
        raise LoadFault(f"{path.name} is no JSON object")
    return content


def _first_error(content: dict[str, Any]) -> str:
    errors = content.get("errors")
    first = next((str(error) for error in errors if error), "") if isinstance(errors, list) else ""
    return f"the first says {first.strip().splitlines()[-1][:300]!r}" if first.strip() else "no error was recorded"
