"""What a call has to do at least, and how fast the device could do it."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass, field
from typing import Any

from epfuse.arguments import checks_enums
from epfuse.bench.amounts import Amount, Positive


class MatrixOperand(enum.Enum):
    """What a path's matrix instructions multiply."""

    BF16 = "bf16"
    FP8 = "fp8"
    FP32 = "fp32"


@dataclass(frozen=True)
class Roof:
    """One rate of the device, measured.

    Attributes:
        rate: bytes or FLOPs a second; None if the device can't do it.
        method: how it was measured, or why it was not.
        spread: interquartile range over the median of the measurement.
    """

    rate: Positive | None
    method: str
    spread: Amount = 0.0


@dataclass(frozen=True)
class Roofs:
    """The rates that bound an expert layer.

    Attributes:
        read: bytes a second from memory.
        matmul: FLOPs a second of one large matrix product, by operand.
    """

    read: Roof
    matmul: dict[MatrixOperand, Roof] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values; rates in bytes and FLOPs a second."""
        named = {"read": self.read} | {f"matmul_{operand.value}": roof for operand, roof in self.matmul.items()}
        return {name: asdict(roof) for name, roof in named.items()}


@checks_enums
@dataclass(frozen=True)
class CallWork:
    """What one call has to do, whoever does it.

    Attributes:
        weight_bytes: weights of the experts that have a row, read once.
        flops: of the rows that routes need; padding is not work.
        operand: what is multiplied.
    """

    weight_bytes: float
    flops: float
    operand: MatrixOperand


@dataclass(frozen=True)
class Floor:
    """The least time that a call could take.

    Attributes:
        seconds: the time.
        bound: ``memory`` or ``matmul``, whichever takes longer.
    """

    seconds: float
    bound: str


def floor_of(work: CallWork, roofs: Roofs) -> Floor:
    """``max(bytes / read rate, FLOPs / matmul rate)``.

    Activations are left out: they are few where weights are streamed, and are hidden where the multiplications bound.
    A rate that was not measured bounds nothing.
    """
    roof = roofs.matmul.get(work.operand)
    read, rate = roofs.read.rate, roof.rate if roof else None
    memory = work.weight_bytes / read if read else 0.0
    matmul = work.flops / rate if rate else 0.0
    return Floor(max(memory, matmul), "memory" if memory >= matmul else "matmul")
