"""A load generator of its own: ``python -m epfuse.serving.stream_load``, for servers beside which no other one is.

Streams completions of random tokens at a fixed concurrency and writes what ``vllm bench serve --save-detailed`` writes.
A thread a request in flight: fit for tens of them, not for hundreds; `vllm bench serve` is for those.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from epfuse.report.write import write_atomic

TIMEOUT = 600.0
"""Seconds without a byte of an answer."""
TOKENS = range(32, 127)
"""Token ids of the prompts: every vocabulary has them, and none has a special one there."""
LONGEST_LINE = 1 << 20


@dataclass
class Answered:
    """One request: seconds by the monotonic clock, or what went wrong."""

    prompt_tokens: int
    start: float
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    latency: float = 0.0
    tokens: int = 0
    text: str = ""
    error: str = ""


def lengths(longest: int, shortest_share: float, draw: random.Random) -> int:
    """A length in [shortest_share x longest, longest]."""
    return draw.randint(max(1, round(longest * shortest_share)), longest)


def request(host: str, port: int, model: str, prompt: list[int], tokens: int) -> Answered:
    """One streamed completion; never raises."""
    answered = Answered(len(prompt), time.perf_counter())
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    try:
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ConnectionError(f"status {response.status}: {response.read(300).decode(errors='replace')}")
        last = answered.start
        for event in _events(response):
            now = time.perf_counter()
            if event.get("error"):
                raise ConnectionError(str(event["error"])[:300])
            if event.get("usage"):
                answered.tokens = int(event["usage"]["completion_tokens"])
            if event.get("choices"):
                answered.text += str(event["choices"][0].get("text") or "")
                if last == answered.start:
                    answered.ttft = now - last
                else:
                    answered.itls.append(now - last)
                last = now
        answered.latency = last - answered.start
        answered.tokens = answered.tokens or len(answered.itls) + 1
        if not answered.ttft:
            raise ConnectionError("the stream ended without a token")
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
        answered.error = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    return answered


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events; it must say that it is done."""
    while line := response.readline(LONGEST_LINE):
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        yield json.loads(data)
    raise ConnectionError("the stream broke off")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Warm up, then measure; the result in vLLM's words."""
    draw = random.Random(options.seed)

    def drawn() -> tuple[list[int], int]:
        prompt = [draw.choice(TOKENS) for _ in range(lengths(options.isl, options.shortest_share, draw))]
        return prompt, lengths(options.osl, options.shortest_share, draw)

    def send(work: tuple[list[int], int]) -> Answered:
        return request(options.host, options.port, options.model, *work)

    warmups, work = ([drawn() for _ in range(count)] for count in (options.warmups, options.prompts))
    with ThreadPoolExecutor(options.concurrency) as pool:
        list(pool.map(send, warmups))
        began, unix = time.perf_counter(), time.time()
        outputs = list(pool.map(send, work))
        duration = time.perf_counter() - began
    good = [output for output in outputs if not output.error]
    total_in, total_out = sum(one.prompt_tokens for one in good), sum(one.tokens for one in good)
    return {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": "epfuse.serving.stream_load",
        "model_id": options.model,
        "tokenizer_id": None,
        "num_prompts": options.prompts,
        "request_rate": "inf",
        "max_concurrency": options.concurrency,
        "duration": duration,
        "benchmark_start_time_unix": unix,
        "benchmark_end_time_unix": unix + duration,
        "completed": len(good),
        "failed": len(outputs) - len(good),
        "total_input_tokens": total_in,
        "total_output_tokens": total_out,
        "request_throughput": len(good) / duration,
        "output_throughput": total_out / duration,
        "total_token_throughput": (total_in + total_out) / duration,
        "input_lens": [one.prompt_tokens for one in outputs],
        "output_lens": [one.tokens if not one.error else 0 for one in outputs],
        "ttfts": [one.ttft for one in outputs],
        "itls": [one.itls for one in outputs],
        "latencies": [one.latency for one in outputs],
        "start_times": [one.start for one in outputs],
        "generated_texts": [one.text for one in outputs],
        "errors": [one.error for one in outputs],
    }


def main(arguments: list[str]) -> int:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m epfuse.serving.stream_load", description=__doc__.splitlines()[0])
    parser.add_argument("--host", required=True)
    parser.add_argument("--model", required=True)
    for name in ("port", "prompts", "concurrency", "warmups", "seed", "isl", "osl"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--shortest-share", type=float, required=True)
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args(arguments)
    write_atomic(options.result, json.dumps(measure(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
