"""What a benchmark found, as data: the JSON record is the result, tables and pictures show it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field
from pydantic_core import to_jsonable_python

from epfuse.arguments import checks_enums
from epfuse.bench.amounts import Amount, Size, Text
from epfuse.bench.contender import Absent, ContenderKind
from epfuse.bench.layers import Layer
from epfuse.bench.measure import Timing
from epfuse.bench.roofline import Roofs

FORMAT = "epfuse-bench-1"
"""First field of every record; a reader refuses others."""


@checks_enums
@dataclass(frozen=True)
class BenchRow:
    """One contender at one token count with one routing. It has a time only if its results were right.

    Attributes:
        contender, weights: who, and in what format; of ours the first is a path's name.
        kind: ours or a peer.
        routing: how tokens were spread, as `Routing` prints it.
        tokens: T.
        rows: local routes, the mean over the calls in turn, like the next four.
        active_experts: local experts with a row.
        weight_bytes: of those experts, in this contender's format.
        flops: of those rows.
        floor_us: the least time of a call on this device, from its measured roofs.
        floor_bound: what sets it, ``memory`` or ``matmul``.
        variants: calls in turn.
        rotated_bytes: bytes of the different weights that they read; below the device's cache the time is not that of
            memory.
        relative_error: worst call's, norm of the error over that of the float64 oracle; None if it did not run.
        error_limit: what it had to stay below.
        block_m: rows that each expert's are padded to a multiple of, if that is known.
        time: None if the row failed.
        failure: why there is no time: a wrong result, or what was raised.
        wrong: whether a result was wrong.
    """

    contender: Annotated[Text, Field(min_length=1)]
    weights: Text
    kind: ContenderKind
    routing: Text
    tokens: Size
    rows: Amount
    active_experts: Amount
    weight_bytes: Amount
    flops: Amount
    floor_us: Amount
    floor_bound: Text
    variants: Size
    rotated_bytes: Amount
    error_limit: Amount
    block_m: Size | None = None
    relative_error: Amount | None = None
    time: Timing | None = None
    failure: str | None = None
    wrong: bool = False

    @property
    def label(self) -> str:
        """Who, in one short line."""
        return self.contender if self.weights in self.contender else f"{self.contender} {self.weights}"

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What two records' rows are matched by, in records of the same layer."""
        return self.contender, self.weights, self.routing, self.tokens

    @property
    def over_floor(self) -> float | None:
        """Time over the floor: 1 is as fast as the roofs allow."""
        return self.time.median_us / self.floor_us if self.time and self.floor_us else None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong: a peer may be unable to run, a path may not."""
        return not self.wrong and (self.kind is ContenderKind.PEER or self.failure is None)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values; an error that is not finite becomes null."""
        values: dict[str, Any] = to_jsonable_python(self, inf_nan_mode="null")
        return values | {"over_floor": self.over_floor, "ok": self.ok}


@dataclass(frozen=True)
class BenchRecord:
    """One run.

    Attributes:
        layer: what was benchmarked.
        device: of `machine.describe_device`.
        roofs: of that device in this run.
        rows: in the order in which they were measured.
        absent: peers that did not take part.
        notes: contender -> what it does.
        run: command, date, seed, versions, commit, clocks.
        complete: whether every row was measured; false in what an interrupted run leaves.
    """

    layer: Layer
    device: dict[str, Any]
    roofs: Roofs
    rows: list[BenchRow] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    complete: bool = True

    @property
    def ok(self) -> bool:
        """Whether no result was wrong and every path of ours ran."""
        return all(row.ok for row in self.rows)

    @property
    def routings(self) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(row.routing for row in self.rows))

    def best_peer(self, routing: str, tokens: int) -> BenchRow | None:
        """The fastest peer with a right result, at one point."""
        timed = [row for row in self.at(routing, tokens) if row.kind is ContenderKind.PEER and row.time is not None]
        return min(timed, key=lambda row: row.time.median_us if row.time else math.inf, default=None)

    def at(self, routing: str, tokens: int) -> list[BenchRow]:
        """The rows of one point."""
        return [row for row in self.rows if row.routing == routing and row.tokens == tokens]

    def over_best_peer(self, row: BenchRow) -> float | None:
        """A path's time over the fastest peer's at its point: below 1 is faster. None for peers and without one."""
        best = self.best_peer(row.routing, row.tokens)
        if row.kind is ContenderKind.PEER or row.time is None or best is None or best.time is None:
            return None
        return row.time.median_us / best.time.median_us

    def to_json(self) -> dict[str, Any]:
        """The record as JSON-ready values. Times in microseconds, rates in bytes and FLOPs a second."""
        layer = {"name": self.layer.name, **asdict(self.layer.shape), "activation": self.layer.activation}
        layer |= {"bias": self.layer.bias.value}
        values = {
            "format": FORMAT,
            "ok": self.ok,
            "complete": self.complete,
            "run": self.run,
            "device": self.device,
            "layer": layer,
            "roofs": self.roofs.to_json(),
            "rows": [row.to_json() | {"over_best_peer": self.over_best_peer(row)} for row in self.rows],
            "absent": self.absent,
            "notes": self.notes,
        }
        return dict(to_jsonable_python(values, inf_nan_mode="null"))


def to_text(record: BenchRecord) -> str:
    """The record as a JSON document."""
    return json.dumps(record.to_json(), indent=2, allow_nan=False) + "\n"
