"""Valid files, mutated with a seed: whatever they become, they are profiled or refused in words, in bounded time."""

from __future__ import annotations

import copy
import io
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from epfuse.errors import EpfuseError
from epfuse.profiling.classify import Classifier
from epfuse.profiling.compare import compare_json
from epfuse.profiling.console import print_comparison, print_profile
from epfuse.profiling.page import profile_page
from epfuse.profiling.profile import profile_trace
from epfuse.profiling.read_trace import read_trace
from epfuse.profiling.record import Profile
from epfuse.profiling.rules import RuleSet
from tests.profiling.traces import TraceFile, server_step

CASES = 300
A_CASE = 20.0
"""CPU seconds that no case may take."""
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 7, 2**63, 10**30, 0.5, 2.0**60, -1e17, 1e308, float("nan"), float("inf")),
    *("", "7", "-7", "[TP00] 7", "\ud800\x00\x1b[31m\u202e", "nn.Module: ALayer_1", "step[MIXED bs=999999999 c_sq=1]"),
    *("x" * 5000, "ncclDevKernel", "cudaGraphLaunch", "kernel", "user_annotation", "cuda_runtime", "gpu_memcpy"),
    *([], {}, [[[]]], {"device": 0}, [{"id": 0, "name": "\ud800"}, {"id": 0, "name": 7}]),
]
TERMINAL_FIT = re.compile(r"[\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]*")


def valid() -> dict[str, Any]:
    trace = TraceFile()
    end = server_step(trace, "execute_context_0(0)_generation_8(8)", 100, dense=0, moe=2)
    end = server_step(trace, "step[EXTEND bs=2 toks=107]", end + 100, dense=0, moe=1)
    trace.range("nn.Module: SomeAttention_0", 80, 60, cat="python_function")
    trace.kernel("Memcpy DtoH", end + 5, 2, cat="gpu_memcpy")
    trace.kernel("of another", 150, 40, device=1, stream=3)
    return trace.other | {"distributedInfo": {"rank": 0}, "traceEvents": trace.events}


def mutated(content: dict[str, Any], draw: random.Random) -> bytes:
    """One to four changes of values, keys and events, now and then of the bytes."""
    content = copy.deepcopy(content)
    events = content["traceEvents"]
    for _ in range(draw.randint(1, 4)):
        event = draw.choice(events)
        where = draw.choice([event, event, event.get("args"), content])
        if not isinstance(where, dict) or not where:
            where = event
        key = draw.choice([key for key in where if key != "traceEvents"] or ["name"])
        match draw.randrange(7):
            case 0:
                where.pop(key, None)
            case 1:
                events.insert(draw.randrange(len(events)), copy.deepcopy(event))
            case 2:
                other = draw.choice(events)
                where[key] = copy.deepcopy(other.get(key, other.get("args")))
            case _:
                where[key] = copy.deepcopy(draw.choice(HOSTILE))
    data = bytearray(json.dumps(content, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass"))
    if draw.random() < 0.2:
        at = draw.randrange(len(data))
        match draw.randrange(3):
            case 0:
                del data[at:]
            case 1:
                data[at] = draw.randrange(256)
            case _:
                data[at:at] = bytes(draw.randrange(32) for _ in range(3))
    return bytes(data)


def outcomes(cases: int, one: Callable[[random.Random], object]) -> Iterator[bool]:
    """Whether each case was taken and not refused. Anything but our own errors escapes."""
    for seed in range(cases):
        began = time.process_time()
        refusal = ""
        try:
            one(random.Random(seed))
        except EpfuseError as error:
            refusal = str(error)
        assert TERMINAL_FIT.fullmatch(refusal), (seed, refusal)
        assert time.process_time() - began < A_CASE, seed
        yield not refusal


def profiles_of(data: bytes, path: Path, classifier: Classifier) -> list[Profile]:
    path.write_bytes(data)
    return profile_trace(read_trace(path), classifier)


def test_traces_alone_and_compared(classifier: Classifier, tmp_path: Path) -> None:
    content, path = valid(), tmp_path / "mutated.json"
    good = profiles_of(json.dumps(content).encode(), tmp_path / "good.json", classifier)[0]

    def one(draw: random.Random) -> None:
        data = mutated(content, draw)
        found = profiles_of(data, path, classifier)
        screen = io.StringIO()
        for profile in found:
            json.dumps(profile.to_json(), allow_nan=False)
            print_profile(profile, Console(file=screen, width=100))
            total = sum(p.ns for p in profile.phases) + sum(k.ns for k in profile.unclassified)
            assert total == profile.time.kernel_sum
            assert 0 <= profile.time.busy <= profile.time.span
        pair = (good, found[0]) if draw.random() < 0.5 else (found[0], good)
        json.dumps(compare_json(*pair), allow_nan=False)
        print_comparison(*pair, Console(file=screen, width=100))
        assert TERMINAL_FIT.fullmatch(screen.getvalue())
        if draw.random() < 0.1:
            profile_page(found, comparison=False).encode()
        try:
            again = json.loads(data.decode("utf-8", "replace"), strict=False)
        except ValueError:
            return
        if draw.random() < 0.3:  # the events in another order say the same
            draw.shuffle(again["traceEvents"])
            shuffled = profiles_of(json.dumps(again).encode(), path, classifier)
            assert [p.to_json() for p in shuffled] == [p.to_json() for p in found]

    taken = list(outcomes(CASES, one))
    assert CASES // 10 < sum(taken) < CASES  # both happen


RULES = """schema: 1
name: mine
source: tests
patterns: {a: &a '(?i)gemm|gemv', b: &b {phase: router}}
glue: ['quant', *a]
rules:
  - {phase: expert GEMM 1, kernel: *a, after: [router, input], weights: mxfp8}
  - {<<: *b, range: '^x > ', position: layer}
  - {phase: combine, kernel: 'sum', layer_has: expert GEMM 1, layer_lacks: [], previous: *a, next: '.'}
"""
PIECES = [
    *("&a ", "*a", "*b", "<<: ", "[", "]", "{", "}", ": ", "- ", "'", '"', "\n", "(", "+)+$", "\\", "? ", "phase", "|"),
    *("!!python/name:os ", "1:1", "0x_", "2001-99-99", "\x1b", "\u202e", "~", ">", "%", "@", "\t", "&c [*c]", "[[]]"),
    *(".inf", "(?P<a>", ""),
]


def test_rules(tmp_path: Path) -> None:
    path = tmp_path / "mutated.yaml"

    def one(draw: random.Random) -> None:
        text = RULES
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice(PIECES) + text[at + draw.randrange(6) :]
        path.write_text(text, encoding="utf-8")
        RuleSet.load(path)

    assert 0 < sum(outcomes(CASES, one)) < CASES
