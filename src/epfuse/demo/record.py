"""What a run of the demo found: the one record that the table, the JSON and the page are made of."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_jsonable_python

from epfuse.arguments import checks_enums

SCHEMA = "epfuse.demo/1"


class CheckVerdict(enum.StrEnum):
    """How one check went."""

    PASSED = "passed"
    FAILED = "failed"
    INFORMATIVE = "informative"
    """Measured, but not required of this run."""


@checks_enums
@dataclass(frozen=True)
class DemoCheck:
    """One comparison.

    Attributes:
        name: what was compared.
        verdict: how it went.
        measured: the number found; None where there is none.
        allowed: the largest number that passes; None where there is none.
        why: where ``allowed`` comes from.
    """

    name: str
    verdict: CheckVerdict
    measured: float | None
    allowed: float | None
    why: str


@dataclass(frozen=True)
class RankLayer:
    """One rank's view of one MoE layer.

    Attributes:
        useful_rows: local routes of the prompt.
        padded_rows: those, rounded up to BLOCK_M expert by expert.
        error: max abs distance of the sum over ranks from transformers' experts in float64.
        unsharded_distance: max abs distance of that sum from fused_experts with all experts on one rank.
    """

    useful_rows: int
    padded_rows: int
    error: float
    unsharded_distance: float


@dataclass(frozen=True)
class RankRecord:
    """What one rank returns.

    Attributes:
        rank: 0..P-1.
        device: where it ran.
        layers: experts module name -> its view.
        logits_rms: RMS distance of the logits from the untouched model's.
        logits_max: max abs distance of them.
        tokens: greedy continuation.
        expert_bytes: expert weights that the rank holds.
        seconds: from start to end of its work.
    """

    rank: int
    device: str
    layers: dict[str, RankLayer]
    logits_rms: float
    logits_max: float
    tokens: list[int]
    expert_bytes: int
    seconds: float


@dataclass(frozen=True)
class LayerRecord:
    """One MoE layer over all ranks.

    Attributes:
        name: experts module.
        routes: T*K.
        useful_rows, padded_rows: by rank, in blocks of the run's BLOCK_M.
        global_rows: rows laid out on each rank if all E experts, remote ones too, were aligned to 64-row tiles.
        error: worst rank's distance of the sum from transformers' experts in float64.
        unsharded_distance: worst rank's distance of the sum from fused_experts on one rank.
        transformers_error: distance of transformers' experts in the run's dtype from themselves in float64.
        clamped: share of gate and up values that the activation's limit cuts.
    """

    name: str
    routes: int
    useful_rows: list[int]
    padded_rows: list[int]
    global_rows: int
    error: float
    unsharded_distance: float
    transformers_error: float
    clamped: float

    @property
    def label(self) -> str:
        """Short name: ``layer 3`` for ``model.layers.3.mlp.experts``."""
        return layer_label(self.name)


@dataclass(frozen=True)
class LogitsRecord:
    """Distance of the worst rank's logits from the untouched model's, and the sizes to read it by.

    Attributes:
        max_abs: largest.
        rms: root mean square.
        noise: RMS distance of the untouched model from itself in float64.
        scale: RMS of the untouched model's logits.
    """

    max_abs: float
    rms: float
    noise: float
    scale: float


@dataclass(frozen=True)
class TrueSizeRecord:
    """One rank's layer at MiniMax-M3's true size on a GPU.

    Attributes:
        device: its name.
        tokens: T.
        local_routes: routes that this rank ran.
        path: of the measured call.
        error: max abs distance from the reference in float64.
        scale: largest magnitude of that reference.
        seconds: one call, after the first.
    """

    device: str
    tokens: int
    local_routes: int
    path: str
    error: float
    scale: float
    seconds: float


@dataclass(frozen=True)
class DemoRecord:
    """A whole run.

    Attributes:
        settings: what was asked for.
        environment: versions, placement, backend.
        text: source, tokens read, greedy continuation of both models.
        block_m: rows of a block that the padding is counted in.
        layers, logits, ranks, true_size, checks: see their classes.
        seconds: by phase.
    """

    settings: dict[str, Any]
    environment: dict[str, str]
    text: dict[str, Any]
    block_m: int
    layers: list[LayerRecord]
    logits: LogitsRecord
    ranks: list[RankRecord]
    true_size: TrueSizeRecord | None
    checks: list[DemoCheck]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """No check failed."""
        return all(check.verdict is not CheckVerdict.FAILED for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The record in JSON's types; a number that is not finite, which JSON lacks, becomes null."""
        return {"schema": SCHEMA, "passed": self.passed, **to_jsonable_python(self, inf_nan_mode="null")}


def layer_label(module: str) -> str:
    """``layer 3`` for a module inside the model's third layer; the name itself where there is no layer number."""
    number = next((part for part in module.split(".") if part.isdigit()), None)
    return module if number is None else f"layer {number}"
