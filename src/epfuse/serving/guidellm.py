"""guidellm as a load tool: how it is asked, and its report in the words of ``vllm bench serve``.

Facts are of guidellm 0.8.1, whose reports have version 2. They say when the first and the last token of a request came,
and nothing of those between: what it measured has no inter-token latencies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from epfuse.errors import ConfigError, first_fault
from epfuse.serving.point import Client

MOST_REQUESTS = 1 << 20
Moment = Annotated[float, Field(ge=0, lt=1e12)]
"""Seconds since 1970."""


def guidellm_command(client: Client, model: str, host: str, port: int, result: Path) -> tuple[str, ...]:
    """The command; its options are JSON, so that no character of a path means anything.

    Warm-up and measurement are two benchmarks of one report: the first has ended before the second begins.

    Args:
        client: the load.
        model: the server's name of the model, and what its tokenizer is loaded from.
        host: of the server.
        port: of the server.
        result: where the report is to lie.
    """
    counts = [count for count in (client.warmups, client.prompts) if count]
    lengths: dict[str, Any] = {"kind": "synthetic_text"}
    for name, longest in (("prompt", client.isl), ("output", client.osl)):
        # without a deviation lengths are drawn evenly between the two
        shortest = max(1, round(longest * client.shortest_share))
        lengths |= {f"{name}_tokens": longest, f"{name}_tokens_min": shortest, f"{name}_tokens_max": longest}
    options = {
        "backend": {
            "kind": "openai_http",
            "target": f"http://{host}:{port}",
            "model": model,
            "request_format": "/v1/completions",
        },
        "profile": {"kind": "concurrent", "streams": [client.concurrency] * len(counts)},
        "constraint": {"kind": "max_requests", "count": counts},
        "data": lengths,
        "seed": {"kind": "static", "value": client.seed},
        "metrics": {"kind": "generative", "sample_size": 0},  # numbers of all requests, texts of none
        "output": {"kind": "json", "path": str(result)},
    }
    argv = [*(client.command or ("guidellm", "run")), "--disable-console-interactive"]
    return (*argv, *(word for name, value in options.items() for word in (f"--{name}", json.dumps(value))))


def is_report(content: Mapping[str, Any]) -> bool:
    """Whether a result is guidellm's."""
    return "benchmarks" in content and "metadata" in content


class _GuidellmPart(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True)


class _Timings(_GuidellmPart):
    request_start: Moment | None = None
    request_end: Moment | None = None
    resolve_start: Moment | None = None
    resolve_end: Moment | None = None
    first_token_iteration: Moment | None = None
    last_token_iteration: Moment | None = None


class _Info(_GuidellmPart):
    timings: _Timings
    error: str | None = None


class _Tokens(_GuidellmPart):
    total_tokens: Annotated[int, Field(ge=0)] | None = None


class _Request(_GuidellmPart):
    info: _Info
    input_metrics: _Tokens = _Tokens()
    output_metrics: _Tokens = _Tokens()


class _Requests(_GuidellmPart):
    successful: list[_Request]
    errored: list[_Request]
    incomplete: list[_Request]


class _Benchmark(_GuidellmPart):
    requests: _Requests


class _Metadata(_GuidellmPart):
    version: Literal[2]


class _GuidellmReport(_GuidellmPart):
    metadata: _Metadata
    benchmarks: Annotated[list[_Benchmark], Field(min_length=1)]


def in_vllms_words(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A report's last benchmark as ``vllm bench serve --save-detailed`` would have written it.

    All numbers are the requests' own; seconds. ``itls`` is not there.

    Args:
        content: the report.
        where: its name, for messages.

    Raises:
        ConfigError: it has another version, or a value that is missing or of another type.
    """
    try:
        found = _GuidellmReport.model_validate(content).benchmarks[-1].requests
    except ValidationError as error:
        place, fault = first_fault(error, "the top")
        raise ConfigError(f"{where}: guidellm's report is wrong at {place}: {fault}") from None
    groups = {"successful": found.successful, "errored": found.errored, "incomplete": found.incomplete}
    requests = [
        (name, request, f"{where}: {name}[{n}]") for name, group in groups.items() for n, request in enumerate(group)
    ]
    if len(requests) > MOST_REQUESTS:
        raise ConfigError(f"{where} has {len(requests)} requests; {MOST_REQUESTS} are the most")
    words: dict[str, Any] = {"backend": "guidellm", "completed": len(found.successful)}
    names = ("input_lens", "output_lens", "ttfts", "latencies", "start_times", "errors")
    words |= {name: [] for name in names}
    begun, ended = [], []
    for group, request, at in requests:
        values, start, end = _values(group, request, at)
        begun.append(start)
        ended.append(end)
        for name, value in zip(names, values, strict=True):
            words[name].append(value)
    words["duration"] = max(ended, default=0.0) - min(begun, default=0.0)
    words["total_input_tokens"], words["total_output_tokens"] = sum(words["input_lens"]), sum(words["output_lens"])
    return words


def _values(group: str, request: _Request, at: str) -> tuple[tuple[Any, ...], float, float]:
    """A request's values in the order of `in_vllms_words`, when it began and when it ended."""
    timings = request.info.timings
    end = _time(timings, at, "request_end", "resolve_end")
    start = _time(timings, at, "request_start", "resolve_start") if group != "incomplete" else end
    if group != "successful":
        return (0, 0, 0.0, 0.0, start, request.info.error or group), start, end
    first, last = _time(timings, at, "first_token_iteration"), _time(timings, at, "last_token_iteration")
    if not start <= first <= last <= end:
        raise ConfigError(f"{at}: its start, first token, last token and end do not follow each other in time")
    tokens = (request.input_metrics.total_tokens, request.output_metrics.total_tokens)
    if not all(tokens):  # guidellm writes 0 where the server's usage does not have the number
        raise ConfigError(f"{at}: its tokens, in and out, are {tokens}; the server must say both in its usage")
    return (*tokens, first - start, last - start, start, ""), start, end


def _time(timings: _Timings, at: str, *names: str) -> float:
    """The first of these that is there."""
    for name in names:
        if (value := getattr(timings, name)) is not None:
            return float(value)
    raise ConfigError(f"{at}: {names[0]} is not there; it must be seconds since 1970")
