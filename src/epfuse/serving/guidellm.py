"""guidellm as a load tool: how it is asked, and its report in the words of ``vllm bench serve``.

Facts are of guidellm 0.8.1, whose reports have version 2. They say when the first and the last token of a request came,
and nothing of those between: what it measured has no inter-token latencies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epfuse.errors import ConfigError
from epfuse.serving.point import Client

VERSION = 2
"""Of the report's format."""
GROUPS = ("successful", "errored", "incomplete")
MOST_REQUESTS = 1 << 20


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


def in_vllms_words(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A report's last benchmark as ``vllm bench serve --save-detailed`` would have written it.

    All numbers are the requests' own; seconds. ``itls`` is not there.

    Args:
        content: the report.
        where: its name, for messages.

    Raises:
        ConfigError: it has another version, or a value that is missing or of another type.
    """
    metadata = _of(content, "metadata", dict, where)
    if metadata.get("version") != VERSION:
        raise ConfigError(f"{where} is guidellm's report of version {metadata.get('version')!r}; {VERSION} is read")
    benchmarks = _of(content, "benchmarks", list, where)
    if not benchmarks:
        raise ConfigError(f"{where} has no benchmark")
    place = f"{where}: benchmarks[{len(benchmarks) - 1}]"
    groups = _of(_object(benchmarks[-1], place), "requests", dict, place)
    requests = []
    for group in GROUPS:
        found = _of(groups, group, list, f"{place}.requests")
        requests += [(group, request, f"{place}.requests.{group}[{n}]") for n, request in enumerate(found)]
    if len(requests) > MOST_REQUESTS:
        raise ConfigError(f"{where} has {len(requests)} requests; {MOST_REQUESTS} are the most")
    words: dict[str, Any] = {"backend": "guidellm", "completed": len(groups["successful"])}
    names = ("input_lens", "output_lens", "ttfts", "latencies", "start_times", "errors")
    words |= {name: [] for name in names}
    begun, ended = [], []
    for group, request, at in requests:
        values, start, end = _request(group, _object(request, at), at)
        begun.append(start)
        ended.append(end)
        for name, value in zip(names, values, strict=True):
            words[name].append(value)
    words["duration"] = max(ended, default=0.0) - min(begun, default=0.0)
    words["total_input_tokens"], words["total_output_tokens"] = sum(words["input_lens"]), sum(words["output_lens"])
    return words


def _request(group: str, request: dict[str, Any], at: str) -> tuple[tuple[Any, ...], float, float]:
    """A request's values in the order of `in_vllms_words`, when it began and when it ended."""
    info = _of(request, "info", dict, at)
    timings = _of(info, "timings", dict, f"{at}.info")
    end = _time(timings, "request_end", "resolve_end", at)
    start = _time(timings, "request_start", "resolve_start", at) if group != "incomplete" else end
    if group != "successful":
        return (0, 0, 0.0, 0.0, start, str(info.get("error") or group)), start, end
    first, last = _time(timings, "first_token_iteration", "", at), _time(timings, "last_token_iteration", "", at)
    if not start <= first <= last <= end:
        raise ConfigError(f"{at}: its start, first token, last token and end do not follow each other in time")
    tokens = [_tokens(request, name, at) for name in ("input_metrics", "output_metrics")]
    return (*tokens, first - start, last - start, start, ""), start, end


def _tokens(request: dict[str, Any], name: str, at: str) -> int:
    count = _of(request, name, dict, at).get("total_tokens")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        # guidellm writes 0 where the server's usage does not have the number
        raise ConfigError(f"{at}: {name}.total_tokens is {str(count)[:40]!r}; the server must say it in its usage")
    return count


def _time(timings: dict[str, Any], name: str, other: str, at: str) -> float:
    value = timings.get(name) if timings.get(name) is not None else timings.get(other)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise ConfigError(f"{at}: {name} is {str(value)[:40]!r}; it must be seconds since 1970")
    return float(value)


def _object(value: object, at: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{at} is a {type(value).__name__}; it must be an object")
    return value


def _of(content: Mapping[str, Any], name: str, kind: type[Any], at: str) -> Any:
    value = content.get(name)
    if not isinstance(value, kind):
        raise ConfigError(f"{at}: {name} is a {type(value).__name__}; it must be a {kind.__name__}")
    return value
