"""Read a benchmark's record, checked in full before anything is done with it: it may be old, cut off or hostile."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from epfuse.bench.amounts import Text
from epfuse.bench.contender import Absent
from epfuse.bench.layers import Layer
from epfuse.bench.record import FORMAT, BenchRecord, BenchRow
from epfuse.bench.roofline import MatrixOperand, Roof, Roofs
from epfuse.config import Bias, LayerShape, SwiGLUOAI
from epfuse.errors import ConfigError, first_fault
from epfuse.input_file import read_file

FOLLOWS = frozenset({"over_floor", "over_best_peer", "ok"})
"""Of a row in a file: what follows from its fields, and is not read."""


def _whole(kind: type[Any]) -> BeforeValidator:
    """In a file each field is said, those with a default too: a row without `wrong` must not read as right."""
    names = {field.name for field in fields(kind)}

    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if missing := sorted(names - value.keys()):
            raise ValueError(f"it has no {', '.join(missing)}")
        if unknown := sorted(value.keys() - names - FOLLOWS):
            raise ValueError(f"it has {unknown[0][:40]!r}, which is not known")
        return value

    return BeforeValidator(check)


class _RecordPart(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class _Activation(_RecordPart):
    alpha: float
    beta: float
    limit: float | None


class _Layer(_RecordPart):
    name: Text
    hidden: int
    intermediate: int
    experts: int
    local_experts: int
    top_k: int
    activation: _Activation
    bias: Literal["none", "added"] = "none"

    def layer(self) -> Layer:
        gate = self.activation
        limit = math.inf if gate.limit is None else gate.limit
        shape = LayerShape(self.hidden, self.intermediate, self.experts, self.local_experts, self.top_k)
        return Layer(self.name, shape, SwiGLUOAI(gate.alpha, gate.beta, limit), Bias(self.bias))


class _Commit(_RecordPart):
    hash: Text
    changed: bool


class _Run(BaseModel):
    """What comparisons and pages read of it; the rest is as the machine gave it."""

    model_config = ConfigDict(extra="allow")

    date: Text
    commit: _Commit | None = None
    clocks: dict[str, dict[str, float | str | None] | None] = Field(default_factory=dict)
    versions: dict[str, str | None] = Field(default_factory=dict)


class _Device(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: Text


def _roofs(entries: dict[str, Roof]) -> Roofs:
    if "read" not in entries:
        raise ValueError("the roof 'read' is missing")
    matmul = {name.removeprefix("matmul_"): roof for name, roof in entries.items() if name != "read"}
    return Roofs(entries["read"], {MatrixOperand(name): roof for name, roof in matmul.items()})


class _File(BaseModel):
    """A record as it stands in a file; what follows from its fields is in it too, and is not read."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    format: Literal["epfuse-bench-1"]
    complete: bool
    run: _Run
    device: _Device
    layer: _Layer
    roofs: dict[str, Annotated[Roof, _whole(Roof)]]
    rows: list[Annotated[BenchRow, _whole(BenchRow)]]
    absent: list[Annotated[Absent, _whole(Absent)]]
    notes: dict[str, str]

    def record(self) -> BenchRecord:
        """As data; ValueError for what each part may be and the whole may not."""
        if len({row.key for row in self.rows}) != len(self.rows):
            raise ValueError("two rows are of one contender, weights, routing and token count")
        for row in self.rows:
            if (row.time is None) is (row.failure is None):
                raise ValueError(f"the row {row.key} must have a time or a failure, and not both")
        return BenchRecord(
            layer=self.layer.layer(),
            device=self.device.model_dump(),
            roofs=_roofs(self.roofs),
            rows=self.rows,
            absent=self.absent,
            notes=self.notes,
            run=self.run.model_dump(exclude_unset=True),
            complete=self.complete,
        )


def read_record(path: Path) -> BenchRecord:
    """A record from a file, checked in full: what is read can be compared and shown.

    Raises:
        ConfigError: the file can't be read or is no record of this format; the message says where it goes wrong.
    """
    data = read_file(path, "record")
    try:
        return _File.model_validate_json(data).record()
    except ValueError as error:  # pydantic's are among them, and those of sizes that no layer has
        place, fault = first_fault(error, "the top") if isinstance(error, ValidationError) else ("the top", str(error))
        raise ConfigError(
            f"record {path} is wrong at {place}: {fault}; it must be {FORMAT!r}, as 'epfuse bench --json' writes it"
        ) from None
