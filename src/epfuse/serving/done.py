"""How a point's job ended and what it measured, as its own file says."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field, FiniteFloat

from epfuse.serving.point import Count, Frozen, Key, Name, Text


class End(StrEnum):
    """How a point ended, by its job's own word."""

    DONE = "done"
    GATED_OUT = "gated_out"
    FAILED = "failed"


class GateResult(Frozen):
    """What the gate found of one arm.

    Attributes:
        difference: mean absolute difference of log probabilities from the baseline's, nats a token; None: not taken.
        allowed: what it may be.
        greedy_equal, greedy_total: tokens that equal the baseline's, of how many.
        evals: task and metric -> value, e.g. ``gsm8k/exact_match,strict-match``.
    """

    passed: bool
    reason: str
    difference: FiniteFloat | None = None
    allowed: FiniteFloat | None = None
    greedy_equal: int | None = None
    greedy_total: int | None = None
    evals: dict[str, FiniteFloat] = Field(default_factory=dict)


class Leg(Frozen):
    """One server's part of a point: an entry of `PointJob.order`.

    Attributes:
        number: from 1, its place in the order.
        folder: relative to the point's folder; file names in it are in `epfuse.serving.layout.LegFolder`.
        metrics: numbers of the tool's own result, e.g. ``total_token_throughput``; empty: it was not measured.
        gate: None: there is none for this arm.
    """

    number: Count
    arm: Name
    folder: Text
    state: End
    reason: str = ""
    started: FiniteFloat
    ended: FiniteFloat
    metrics: dict[str, FiniteFloat] = Field(default_factory=dict)
    gate: GateResult | None = None


class Done(Frozen):
    """The end of a point, and the truth about it: ``done.json``, written last.

    Attributes:
        key: of the attempt that wrote it.
        reason: one sentence; why it failed.
        node: where it ran.
        started, ended: seconds since 1970.
        legs: in the order in which they ran, as far as they did.
    """

    version: Literal[1] = Field(default=1, alias="schema")
    name: Name
    key: Key
    state: End
    reason: str = ""
    node: str = ""
    started: FiniteFloat
    ended: FiniteFloat
    legs: tuple[Leg, ...] = ()
