"""Predictions for MiniMax-M3 on MI300X at the published points, from the time model and the compiled inner loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from epfuse.aot.kernels import Kernel
from epfuse.config import MINIMAX_M3_EP8
from epfuse.hardware.published import BF16_POINTS, BLOCK_FP8_POINT, MOE_LAYERS
from epfuse.hardware.time_model import (
    MI300X,
    MI300X_ROUTING,
    PATHS,
    PROFILED_BF16,
    PROFILED_BLOCK_FP8,
    Comparison,
    Kernels,
    MeasuredTime,
    compare,
    expert_gemms,
    predicted_ms,
)

CLOCKS = 4
"""Clocks of a vector instruction: 64 lanes on a SIMD of 16."""
SHAPE = "minimax-m3"


@dataclass(frozen=True)
class Prediction:
    """Predicted milliseconds of both expert GEMMs over the 57 layers of one decode step.

    Attributes:
        kernels: what would run.
        milliseconds: point -> time.
        bound: point -> what gate_up waits for.
    """

    kernels: Kernels
    milliseconds: dict[str, float]
    bound: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "path": self.kernels.name,
            "predicted_ms": {name: round(value, 3) for name, value in self.milliseconds.items()},
            "bound": self.bound,
            "vector_clocks_per_weight": [round(clocks, 4) for clocks in self.kernels.vector_clocks],
        }


def published() -> list[Comparison]:
    """The published measurements beside what the model says of them."""
    measurements = [
        MeasuredTime(point.name, PROFILED_BF16, point.tokens, point.expert_gemms_ms, MOE_LAYERS)
        for point in BF16_POINTS
    ]
    fp8 = BLOCK_FP8_POINT
    measurements.append(MeasuredTime(fp8.name, PROFILED_BLOCK_FP8, fp8.tokens, fp8.expert_gemms_ms, MOE_LAYERS))
    return compare(MI300X, MINIMAX_M3_EP8, measurements, MI300X_ROUTING)


def predictions(kernels: Sequence[Kernel], compared: Sequence[Kernel]) -> list[Prediction]:
    """Every path's predictions.

    Args:
        kernels: compiled for gfx942; a path without its GEMMs among them is predicted without the vector ALU's limit.
        compared: the compiled GEMM1 of pull request 1782, if it is there.
    """
    found = []
    for name, path in PATHS.items():
        own = [kernel for kernel in kernels if _decodes(kernel, "bf16" if name == "seed-1782" else name)]
        gate_up = next((k for k in compared if name == "seed-1782"), _stage(own, "gate_up"))
        model = replace(path, vector_clocks=(_clocks(gate_up), _clocks(_stage(own, "down"))))
        milliseconds, bound = {}, {}
        for point in BF16_POINTS:
            arguments = (MI300X, model, MINIMAX_M3_EP8, point.tokens, MI300X_ROUTING)
            milliseconds[point.name] = predicted_ms(*arguments, MOE_LAYERS)
            bound[point.name] = expert_gemms(*arguments)[0].bound
        found.append(Prediction(model, milliseconds, bound))
    return found


def _decodes(kernel: Kernel, path: str) -> bool:
    """Whether the kernel is a GEMM that ``path`` runs at the points' token counts, in BF16, at MiniMax-M3's size."""
    use, tile = kernel.use, kernel.tile
    return (
        tile is not None and path in use.paths and "bf16" in use.dtypes and SHAPE in use.shapes and use.tokens[0] == 1
    )


def _stage(kernels: Sequence[Kernel], stage: str) -> Kernel | None:
    return next((kernel for kernel in kernels if kernel.launch.stage == stage), None)


def _clocks(kernel: Kernel | None) -> float:
    """Vector ALU clocks of one weight of one row block; 0 where nothing was compiled."""
    if kernel is None or kernel.loop is None or kernel.tile is None:
        return 0.0
    weights = kernel.tile.block_n * kernel.tile.block_k * kernel.steps_by_matrix()
    return kernel.loop.vector * CLOCKS * (kernel.lanes // 64) / weights
