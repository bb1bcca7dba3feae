"""What a load measured, computed anew from its requests; files from outside are hostile until checked.

A result is one JSON object in the words of ``vllm bench serve --save-result --save-detailed``, or guidellm's report.
Nothing that a tool summarised is believed where the requests are there.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from epfuse.errors import ConfigError, first_fault
from epfuse.input_file import read_json
from epfuse.serving.guidellm import in_vllms_words, is_report

LARGEST_RESULT = 512 << 20
"""Bytes. 2560 requests with 1024 intervals each have about 60 MiB."""
MOST_REQUESTS = 1 << 20
PERCENTILES = (50.0, 90.0, 99.0, 99.9)
Seconds = Annotated[float, Field(ge=0, lt=1e12)]
Tokens = Annotated[int, Field(ge=0, lt=1 << 40)]
LEAST_STEADY = 3.0
"""Times that a steady window must hold a median request; below, it is no window."""


@dataclass(frozen=True)
class AnsweredRequest:
    """A request that was answered; seconds.

    Attributes:
        start: of sending, on a clock that all requests share; None: unknown.
        ttft: to the first token.
        itls: between what came one after the other; None: unknown.
        latency: to the last token.
        inputs, outputs: tokens.
    """

    start: float | None
    ttft: float
    itls: tuple[float, ...] | None
    latency: float
    inputs: int
    outputs: int

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None of a single token."""
        return (self.latency - self.ttft) / (self.outputs - 1) if self.outputs > 1 else None

    @property
    def times(self) -> list[float]:
        """When something came, from the start; evenly spaced where nobody knows."""
        gaps = self.itls if self.itls is not None else (self.tpot or 0.0,) * (self.outputs - 1)
        return list(accumulate(gaps, initial=self.ttft))


@dataclass(frozen=True)
class Spread:
    """A distribution, in the unit of its values."""

    mean: float
    std: float
    percentiles: dict[float, float]

    @property
    def median(self) -> float:
        return self.percentiles[50.0]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Of some values; None of none."""
        if not values:
            return None
        ordered = sorted(values)
        shares = {share: percentile(ordered, share) for share in PERCENTILES}
        return cls(statistics.fmean(ordered), statistics.pstdev(ordered), shares)


@dataclass(frozen=True)
class Steady:
    """The window in which the server was as full as it was meant to be.

    Attributes:
        start, end: seconds on the requests' clock.
        output, total: tokens a second in it.
    """

    start: float
    end: float
    output: float
    total: float


@dataclass(frozen=True)
class MeasuredLoad:
    """A load.

    Attributes:
        duration: seconds.
        failed: requests without an answer.
        inputs, outputs: tokens of the answered requests.
        ttft, tpot, itl, e2el: seconds; None where nothing has one.
        steady: None where the file does not say when requests began, or the server was never full for long.
    """

    duration: float
    completed: int
    failed: int
    inputs: int
    outputs: int
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2el: Spread | None
    steady: Steady | None

    @property
    def total_throughput(self) -> float:
        """Tokens a second, in and out."""
        return (self.inputs + self.outputs) / self.duration

    @property
    def output_throughput(self) -> float:
        """Generated tokens a second."""
        return self.outputs / self.duration

    @property
    def input_throughput(self) -> float:
        """Tokens of prompts a second."""
        return self.inputs / self.duration

    @property
    def per_user(self) -> float | None:
        """Tokens a second that one user sees: 1 / median time per output token."""
        return None if self.tpot is None or self.tpot.median <= 0 else 1 / self.tpot.median

    @property
    def spreads(self) -> dict[str, Spread | None]:
        """By InferenceX' short names."""
        return {"ttft": self.ttft, "tpot": self.tpot, "itl": self.itl, "e2el": self.e2el}


class _Raw(BaseModel):
    """The lists of a result, an entry a request; start_times, latencies, itls and errors may be missing or empty."""

    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True, allow_inf_nan=False)

    duration: Annotated[Seconds, Field(gt=0)]
    ttfts: Annotated[list[Seconds], Field(max_length=MOST_REQUESTS)]
    input_lens: list[Tokens]
    output_lens: list[Tokens]
    start_times: list[Seconds] | None = None
    latencies: list[Seconds] | None = None
    itls: list[list[Seconds]] | None = None
    errors: list[Any] | None = None

    @model_validator(mode="after")
    def _as_many(self) -> _Raw:
        for name in ("input_lens", "output_lens", "start_times", "latencies", "itls", "errors"):
            values = getattr(self, name)
            if values and len(values) != len(self.ttfts):
                raise ValueError(f"{name} has {len(values)} values; ttfts has {len(self.ttfts)}")
        if not self.latencies and len(self.itls or ()) != len(self.ttfts):
            raise ValueError("itls is not there, nor are latencies")
        return self

    def answered(self, where: str) -> Iterator[AnsweredRequest]:
        """The requests that were.

        Raises:
            ConfigError: one had its last token before its first.
        """
        for n, (ttft, inputs, outputs) in enumerate(zip(self.ttfts, self.input_lens, self.output_lens, strict=True)):
            if outputs and not (self.errors and self.errors[n]):
                itls = tuple(self.itls[n]) if self.itls else None
                latency = self.latencies[n] if self.latencies else ttft + math.fsum(itls or ())
                if latency < ttft * (1 - 1e-9):
                    raise ConfigError(f"{where}: latencies[{n}] is {latency}, less than its ttft, {ttft}")
                start = self.start_times[n] if self.start_times else None
                yield AnsweredRequest(start, ttft, itls, max(latency, ttft), inputs, outputs)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Linear between the two nearest ranks, as numpy has it.

    Args:
        ordered: ascending, not empty.
        share: percent.
    """
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def read_result(path: Path, concurrency: int) -> MeasuredLoad:
    """A load's result.

    Args:
        path: of the file.
        concurrency: requests in flight that the load was asked for.

    Raises:
        ConfigError: it can't be read, is torn, or a value in it has another type, sign or length than it must have;
            the message names file and key.
    """
    where = f"result {path}"
    content = read_json(path, "result", LARGEST_RESULT)
    if not isinstance(content, dict):
        raise ConfigError(f"{where} is a {type(content).__name__}; it must be an object")
    if is_report(content):
        content = in_vllms_words(content, where)
    try:
        raw = _Raw.model_validate(content)
    except ValidationError as error:
        place, fault = first_fault(error, "the top")
        raise ConfigError(f"{where} is wrong at {place}: {fault} (--save-detailed writes all requests)") from None
    requests = list(raw.answered(where))
    if not requests:
        raise ConfigError(f"{where} has no request that was answered")
    return MeasuredLoad(
        duration=raw.duration,
        completed=len(requests),
        failed=len(raw.ttfts) - len(requests),
        inputs=sum(request.inputs for request in requests),
        outputs=sum(request.outputs for request in requests),
        ttft=Spread.of([request.ttft for request in requests]),
        tpot=Spread.of([tpot for request in requests if (tpot := request.tpot) is not None]),
        itl=Spread.of([itl for request in requests for itl in request.itls or ()]),
        e2el=Spread.of([request.latency for request in requests]),
        steady=steady_window(requests, concurrency),
    )


def steady_window(requests: Sequence[AnsweredRequest], concurrency: int) -> Steady | None:
    """From when as many requests are in flight as ever were, of those asked for, until when they last are.

    A token counts when it came; of what came in one piece, each piece counts the same share of the request's tokens.
    A prompt counts when its first token came.

    Args:
        requests: the answered ones.
        concurrency: that was asked for.
    """
    if not requests or any(request.start is None for request in requests):
        return None
    timed = [(request.start or 0.0, request) for request in requests]
    changes = sorted(
        change for start, request in timed for change in ((start, 1), (start + request.latency, -1))
    )  # at one moment ends come first: a request that takes another's place is not a second one
    levels = list(accumulate(change for _, change in changes))
    full = min(concurrency, max(levels))
    at_level = [place for place, level in enumerate(levels) if level >= full]
    start, end = changes[at_level[0]][0], changes[min(at_level[-1] + 1, len(changes) - 1)][0]
    if end - start < LEAST_STEADY * statistics.median(request.latency for request in requests):
        return None
    output = inputs = 0.0
    for began, request in timed:
        first = began + request.ttft
        times = [began + time for time in request.times]
        pieces = bisect_left(times, end) - bisect_left(times, start)
        output += request.outputs * pieces / len(times)
        inputs += request.inputs * (start <= first < end)
    return Steady(start, end, output / (end - start), (output + inputs) / (end - start))
