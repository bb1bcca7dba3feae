"""What a run of ``epfuse aot`` found, as data: the JSON record is the result, tables show it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from epfuse.aot.gates import Gate
from epfuse.aot.kernels import Kernel
from epfuse.aot.predict import Prediction, published
from epfuse.arguments import checks_enums
from epfuse.hardware.time_model import MI300X, MI300X_ROUTING
from epfuse.target import Target
from epfuse.verify.record import versions


@checks_enums
@dataclass(frozen=True)
class TargetRecord:
    """One target's kernels and gates.

    Attributes:
        target: the GPU.
        kernels: what calls can launch.
        compared: kernels of others, compiled beside.
        gates: on ``kernels``.
    """

    target: Target
    kernels: list[Kernel]
    compared: list[Kernel]
    gates: list[Gate]

    @property
    def ok(self) -> bool:
        """Whether every gate holds."""
        return all(gate.ok for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "target": self.target.value,
            **{name: [one.to_json() for one in getattr(self, name)] for name in ("kernels", "compared", "gates")},
            "ok": self.ok,
        }


@dataclass(frozen=True)
class AotRecord:
    """One run.

    Attributes:
        targets: in the order that was asked for.
        predictions: for MI300X, if gfx942 is among the targets.
    """

    targets: list[TargetRecord]
    predictions: list[Prediction]

    @property
    def ok(self) -> bool:
        """Whether every gate of every target holds."""
        return all(target.ok for target in self.targets)

    def to_json(self, command: str) -> dict[str, Any]:
        """The record as JSON-ready values; ``command`` is what was typed."""
        return {
            "command": command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "targets": [target.to_json() for target in self.targets],
            "model": self._model() if self.predictions else None,
            "ok": self.ok,
        }

    def _model(self) -> dict[str, Any]:
        return {
            "machine": MI300X.name,
            "eta": MI300X.eta,
            "launch_us": 1e6 * MI300X.launch_seconds,
            "routing_skew": MI300X_ROUTING.skew,
            "source": MI300X.source,
            "published": [
                {
                    "point": comparison.measurement.name,
                    "kernels": comparison.measurement.kernels.name,
                    "measured_ms": comparison.measurement.milliseconds,
                    "model_ms": round(comparison.predicted_ms, 3),
                    "error": round(comparison.error, 4),
                }
                for comparison in published()
            ],
            "predictions": [prediction.to_json() for prediction in self.predictions],
        }
