"""The expert phases against memory: bytes that must move, rate reached, and what the time model says of other paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from epfuse.config import LayerShape
from epfuse.hardware.time_model import BALANCED, PATHS, Machine, expert_gemms
from epfuse.profiling.phases import EXPERT_PHASES, Phase
from epfuse.profiling.shapes import WEIGHT_BYTES, ExpertShape

ROW_BYTES = 2
"""Of one activation: BF16."""


@dataclass(frozen=True)
class ExpertStep:
    """What the expert phases of one step did.

    Attributes:
        tokens: T; None if the trace does not say.
        layers: with experts.
        ns: kernel time by phase.
    """

    tokens: int | None
    layers: int
    ns: dict[Phase, int]


@dataclass(frozen=True)
class GemmRate:
    """One expert GEMM in the window.

    Attributes:
        phase: which.
        ns: kernel time.
        bytes: that must move: the weights of every expert that is expected to have a row, once, and the rows.
        rate: bytes a second.
        fraction: of the device's peak; None if that is not known.
    """

    phase: Phase
    ns: int
    bytes: float
    rate: float
    fraction: float | None


@dataclass(frozen=True)
class PathPrediction:
    """The expert phases' time on another path, by the time model: never measured.

    Attributes:
        path: name in `epfuse.hardware.time_model.PATHS`.
        ns: predicted for both GEMMs with the activation fused, over the window.
        saved: the measured time of the expert phases minus that; negative if the path would be slower.
    """

    path: str
    ns: float
    saved: float


@dataclass(frozen=True)
class ExpertView:
    """The expert phases of a window.

    Attributes:
        shape: one rank's experts.
        weights: their format in memory.
        weights_from: who says so.
        tokens: T of each step; None for one that does not say: all local experts are then taken to have rows.
        active_experts: expected number of local experts with a row, mean over the steps; balanced routing.
        ns: kernel time of GEMMs and activation, measured.
        gemms: the two.
        predictions: by path; empty if the model does not know the device or a step's tokens.
        machine: what they are predicted for.
    """

    shape: ExpertShape
    weights: str
    weights_from: str
    tokens: list[int | None]
    active_experts: float
    ns: int
    gemms: list[GemmRate]
    predictions: list[PathPrediction]
    machine: Machine | None


def view_experts(
    steps: Sequence[ExpertStep],
    shape: ExpertShape,
    weights: str,
    weights_from: str,
    peak: float | None,
    machine: Machine | None,
) -> ExpertView | None:
    """Bytes, rates and predictions of a window; None if it has no expert GEMM.

    Args:
        steps: of the window.
        shape: one rank's experts.
        weights: their format in memory.
        weights_from: who says so.
        peak: memory bandwidth of the device, bytes a second, if known.
        machine: what the time model knows of it, if anything.
    """
    measured = {phase: sum(step.ns.get(phase, 0) for step in steps) for phase in EXPERT_PHASES}
    if not measured[Phase.GEMM1]:
        return None
    gemms = []
    for phase in (Phase.GEMM1, Phase.GEMM2):
        ns = measured[phase]
        if ns:  # a kernel that does both GEMMs counts as the first
            moved = sum(
                step.layers * moved_bytes(phase, shape.layer, step.tokens, WEIGHT_BYTES[weights]) for step in steps
            )
            rate = moved / (ns * 1e-9)
            gemms.append(GemmRate(phase, ns, moved, rate, rate / peak if peak else None))
    total = sum(measured.values())
    predictions = []
    if machine is not None and all(step.tokens for step in steps):
        for name, kernels in PATHS.items():
            seconds = sum(
                step.layers * sum(stage.seconds for stage in expert_gemms(machine, kernels, shape.layer, step.tokens))
                for step in steps
                if step.tokens
            )
            predictions.append(PathPrediction(name, seconds * 1e9, total - seconds * 1e9))
    return ExpertView(
        shape=shape,
        weights=weights,
        weights_from=weights_from,
        tokens=[step.tokens for step in steps],
        active_experts=sum(active_experts(shape.layer, step.tokens) for step in steps) / len(steps),
        ns=total,
        gemms=gemms,
        predictions=predictions,
        machine=machine,
    )


def active_experts(layer: LayerShape, tokens: int | None) -> float:
    """Local experts that are expected to have a row, with a balanced router; all of them if T is not known."""
    return float(layer.local_experts) if tokens is None else BALANCED.active_experts(layer, tokens)


def moved_bytes(phase: Phase, layer: LayerShape, tokens: int | None, weight_bytes: float) -> float:
    """Bytes that one GEMM of one layer can't avoid: active experts' weights once, rows in and out.

    Args:
        phase: GEMM1 (gate and up, activation fused) or GEMM2.
        layer: one rank's sizes.
        tokens: T; None counts all local experts and no rows.
        weight_bytes: of one weight, scales included.
    """
    rows = (tokens or 0) * layer.top_k * layer.local_experts / layer.experts
    projections = 2 if phase is Phase.GEMM1 else 1
    weights = projections * layer.hidden * layer.intermediate
    return (
        active_experts(layer, tokens) * weights * weight_bytes + rows * (layer.hidden + layer.intermediate) * ROW_BYTES
    )
