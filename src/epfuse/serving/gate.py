"""The accuracy gate: what a server answers is compared with the baseline's answers before its speed counts.

Teacher forcing: every server reads the same fixed texts and says how probable each next token was. Rounding moves these
log probabilities a little, wrong experts move them a lot, and nothing that one token decides changes what comes after
it, as it does in generated text. How much rounding moves them is measured: the baseline reads the texts one by one and
again together, which takes it through kernels of other shapes. Greedy tokens are compared too, but only reported: two
right servers differ in some of them.
"""

from __future__ import annotations

import http.client
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from epfuse.errors import EpfuseError
from epfuse.serving.done import GateResult
from epfuse.serving.point import AccuracyGate
from epfuse.serving.server import ask

TAIL = 0.99
"""Two experts exchanged touch few tokens: a mean would drown them, this quantile does not."""
TAIL_FACTOR = 10.0
"""The tail's least allowance over the mean's, where rounding's tail is unknown: a token whose router was almost even
moves by some ten times the mean in a right server too."""


class GateFault(EpfuseError):
    """A server's answers can't be judged: refused, missing, or no log probabilities.

    Fix: look into the server's log beside the point, and let it return log probabilities.
    """


@dataclass(frozen=True)
class Reading:
    """What a server said of the gate's texts.

    Attributes:
        logprobs: text by text, of each token but the first, nats.
        greedy: text by text, the tokens that follow it.
    """

    logprobs: tuple[tuple[float, ...], ...]
    greedy: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Distance:
    """How far two readings are apart, nats a token: the mean of the absolute differences, and their 99th percentile."""

    mean: float
    tail: float


@dataclass(frozen=True)
class Reference:
    """The baseline.

    Attributes:
        reading: what others are compared with.
        noise: how far its other readings were from it, at the most.
    """

    reading: Reading
    noise: Distance


def read(port: int, model: str, gate: AccuracyGate, at_once: int, timeout: float) -> Reading:
    """Let a server read the gate's texts.

    Args:
        port: of the server, on this machine.
        model: its name of the model.
        gate: texts, and how many greedy tokens.
        at_once: texts that it gets at the same time.
        timeout: seconds of one request.

    Raises:
        GateFault: it does not answer as the OpenAI API says.
    """

    def one(text: str) -> tuple[tuple[float, ...], tuple[str, ...]]:
        body = {"model": model, "prompt": text, "temperature": 0.0, "logprobs": 1, "seed": 0}
        forced = _logprobs(port, {**body, "max_tokens": 1, "echo": True}, timeout)
        prompt_tokens = len(forced[1]) - 1
        if prompt_tokens < 2:
            raise GateFault("a text of the gate has fewer than two tokens; give longer ones")
        values = forced[1][1:prompt_tokens]
        greedy = (
            _logprobs(port, {**body, "max_tokens": gate.greedy_tokens, "ignore_eos": True}, timeout)[0]
            if gate.greedy_tokens
            else ()
        )
        return tuple(_checked(values)), tuple(greedy)

    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(one, gate.prompts))
    return Reading(tuple(logprobs for logprobs, _ in found), tuple(greedy for _, greedy in found))


def reference_of(readings: Sequence[Reading]) -> Reference:
    """The baseline from its readings, the first of which others are compared with.

    Raises:
        GateFault: they have different tokens.
    """
    first, *others = readings
    distances = [distance(first, other) for other in others]
    return Reference(
        first,
        Distance(max((one.mean for one in distances), default=0.0), max((one.tail for one in distances), default=0.0)),
    )


def judge(reading: Reading, reference: Reference, gate: AccuracyGate) -> GateResult:
    """Whether a server may be timed."""
    try:
        found = distance(reading, reference.reading)
    except GateFault as fault:
        return GateResult(passed=False, reason=str(fault))
    mean = max(gate.least, gate.factor * reference.noise.mean)
    tail = max(TAIL_FACTOR * gate.least, gate.factor * reference.noise.tail)
    equal, total = _greedy(reading, reference.reading)
    passed = found.mean <= mean and found.tail <= tail
    reason = (
        f"log probabilities differ from the baseline's by {found.mean:.4f} nats a token in the mean (allowed"
        f" {mean:.4f}) and {found.tail:.4f} in the 99th percentile (allowed {tail:.4f}); the baseline differs from"
        f" itself by {reference.noise.mean:.4f} and {reference.noise.tail:.4f}"
    )
    return GateResult(
        passed=passed, reason=reason, difference=found.mean, allowed=mean, greedy_equal=equal, greedy_total=total
    )


def distance(one: Reading, other: Reading) -> Distance:
    """How far two readings are apart.

    Raises:
        GateFault: their texts have different numbers of tokens, or none.
    """
    if [len(text) for text in one.logprobs] != [len(text) for text in other.logprobs]:
        raise GateFault("the texts have other tokens than in the baseline: it is another tokenizer, so another model")
    differences = sorted(
        abs(a - b)
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )
    if not differences:
        raise GateFault("there is not one log probability")
    return Distance(math.fsum(differences) / len(differences), differences[math.ceil(TAIL * len(differences)) - 1])


def _greedy(one: Reading, other: Reading) -> tuple[int, int]:
    """Tokens at the same place that are equal, of how many."""
    pairs = [
        (a, b)
        for mine, theirs in zip(one.greedy, other.greedy, strict=True)
        for a, b in zip(mine, theirs, strict=False)
    ]
    return sum(a == b for a, b in pairs), len(pairs)


def _logprobs(port: int, body: dict[str, Any], timeout: float) -> tuple[list[str], list[Any]]:
    """Tokens and log probabilities of an answer of ``/v1/completions``."""
    try:
        status, answer = ask(port, "POST", "/v1/completions", body, timeout)
    except (OSError, http.client.HTTPException) as error:
        raise GateFault(f"the server does not answer the gate: {error!r}") from None
    if status != 200:
        raise GateFault(f"the server refuses the gate's request ({status}): {answer[:300].decode(errors='replace')}")
    try:
        (choice,) = json.loads(answer)["choices"]
        tokens, values = choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]
        if not (isinstance(tokens, list) and isinstance(values, list) and len(tokens) == len(values)):
            raise TypeError("tokens and token_logprobs are no lists of one length")
        return [str(token) for token in tokens], values
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise GateFault(f"the server's answer has no log probabilities: {error!r:.200}") from None


def _checked(values: list[Any]) -> list[float]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value > 1e-3:
            raise GateFault(f"the server calls {value!r:.40} a log probability; it must be finite and at most 0")
    return [float(value) for value in values]
