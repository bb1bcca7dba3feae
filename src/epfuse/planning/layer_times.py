"""How long one layer takes by token count: epfuse, the experts that would run otherwise, and the floor.

Each time says what it is: measured on this product, for this layer, at this token count; or predicted by the time
model. Where neither is known there is no number.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, replace
from importlib import resources
from typing import Any

from epfuse.arguments import checks_enums
from epfuse.config import Bias, Path, SwiGLUOAI
from epfuse.hardware.time_model import PATHS, PROFILED_BF16, Kernels, predicted_ms
from epfuse.measured.lookup import sources
from epfuse.planning.model_plan import ModelPlan
from epfuse.policy import Decision, LayerPlan
from epfuse.policy.rivals import evidence_of
from epfuse.target import Target

TOKENS = tuple(1 << exponent for exponent in range(14))
"""T of a call: 1 to 8192."""

RIVALS = {
    (Target.GFX942, "Mxfp8EmulationTritonExperts"): PROFILED_BF16,
    (Target.GFX942, "TritonExperts"): PROFILED_BF16,
}
"""(target, vLLM's class) -> its kernels in the time model, which was fitted to them."""

NOT_FITTED = "it was fitted to this GPU's own kernels, and the portable ones are slower"
"""What a prediction says where the portable kernels run instead."""


@dataclass(frozen=True)
class Rival:
    """The experts that run if epfuse does not.

    Attributes:
        name: their class.
        effect: one sentence on what that means.
        plugin: one sentence: whether epfuse's plugin takes the layer from them, or why it does not.
    """

    name: str
    effect: str
    plugin: str


@dataclass(frozen=True)
class Time:
    """One layer's time.

    Attributes:
        microseconds: of a call where it is measured, of both expert GEMMs where it is predicted.
        kind: ``measured`` or ``predicted``.
        source: the record or table, or the time model's machine.
    """

    microseconds: float
    kind: str
    source: str

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"us": round(self.microseconds, 2), "kind": self.kind, "source": self.source}


@dataclass(frozen=True)
class PlannedLayerTime:
    """One layer at one token count.

    Attributes:
        tokens: T.
        path: what epfuse runs; None if it leaves the layer.
        ours: epfuse's time.
        theirs: the rival's.
        floor: the least that the active experts' bytes and the rows' FLOPs allow, microseconds.
    """

    tokens: int
    path: str | None
    ours: Time | None
    theirs: Time | None
    floor: float | None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values; times in microseconds."""
        return {
            "tokens": self.tokens,
            "path": self.path,
            "epfuse": None if self.ours is None else self.ours.to_json(),
            "vllm": None if self.theirs is None else self.theirs.to_json(),
            "floor_us": None if self.floor is None else round(self.floor, 2),
        }


@functools.cache
def beside_vllm() -> tuple[dict[str, Any], ...]:
    """Times that were measured beside vLLM's experts in one run; ``tools/beside_vllm.py`` writes them."""
    text = resources.files("epfuse.planning").joinpath("beside_vllm.json").read_text(encoding="utf-8")
    return tuple(json.loads(text))


def layer_times(plan: ModelPlan, rival: Rival | None) -> tuple[PlannedLayerTime, ...]:
    """The first layer with experts at each of `TOKENS`.

    Args:
        plan: whose layers.
        rival: what would run it otherwise; None if that is not known.
    """
    return tuple(_at(plan, rival, tokens) for tokens in TOKENS)


def evidence(plan: ModelPlan, rival: Rival | None) -> str | None:
    """What is known of epfuse beside the rival on this target, in a sentence."""
    found = None if rival is None else evidence_of(plan.groups[0].plan, rival.name)
    return None if found is None else found.reason


def _at(plan: ModelPlan, rival: Rival | None, tokens: int) -> PlannedLayerTime:
    layer = plan.groups[0].plan
    decision = None if layer.is_untouched else layer.at(tokens)
    path = None if decision is None else decision.path
    pair = (
        None
        if rival is None or path is None or not _is_as_measured(layer)
        else _measured_pair(plan, rival, path, tokens)
    )
    if pair is not None:
        source = f"docs/records/{pair['record']}"
        ours: Time | None = Time(pair["ours_us"], "measured", source)
        theirs: Time | None = Time(pair["theirs_us"], "measured", source)
    else:
        ours = None if decision is None else _tuned(plan, decision, tokens) or _predicted(plan, decision, tokens)
        theirs = None if rival is None else _rivals(plan, rival, tokens)
    product = plan.serving.product
    active = product.routing.active_experts(plan.shape, tokens) if pair is None else pair["active"]
    return PlannedLayerTime(
        tokens, None if path is None else path.value, ours, theirs, _floor(plan, path, tokens, active)
    )


@checks_enums
def _measured_pair(plan: ModelPlan, rival: Rival, path: Path, tokens: int) -> dict[str, Any] | None:
    asked = (plan.serving.product.device_name, asdict(plan.shape), rival.name, path.value, tokens)
    rows = [
        row
        for row in beside_vllm()
        if (row["device"], row["shape"], row["experts"], row["path"], row["tokens"]) == asked
    ]
    return rows[-1] if rows else None  # the newest: records are sorted by date


def _tuned(plan: ModelPlan, decision: Decision, tokens: int) -> Time | None:
    """This product's own row of the tuned tables, for this layer and this T."""
    product = plan.serving.product
    layer = plan.groups[0].plan.request
    if decision.weights is None or not isinstance(layer.activation, SwiGLUOAI):
        return None
    kind = product.target, product.device_name, decision.path, decision.weights, plan.shape, layer.bias
    for source in sources(*kind):
        for point in source.points:
            if source.is_own and point.tokens == tokens:
                return Time(point.microseconds, "measured", f"tuned table of {source.device}, {source.date}")
    return None


def _predicted(plan: ModelPlan, decision: Decision, tokens: int) -> Time | None:
    if decision.tiles is None:
        return None
    kernels = replace(PATHS[decision.path.value], block_m=decision.tiles.block_m)
    layer = plan.groups[0].plan
    return _modelled(plan, kernels, tokens, "" if layer.why_portable is None else f"; {NOT_FITTED}")


def _rivals(plan: ModelPlan, rival: Rival, tokens: int) -> Time | None:
    kernels = RIVALS.get((plan.serving.product.target, rival.name))
    return None if kernels is None else _modelled(plan, kernels, tokens)


def _modelled(plan: ModelPlan, kernels: Kernels, tokens: int, but: str = "") -> Time | None:
    product = plan.serving.product
    if product.machine is None:
        return None
    inputs = plan.model.activation.inputs
    milliseconds = predicted_ms(product.machine, kernels, plan.shape, tokens, product.routing, inputs=inputs)
    return Time(1e3 * milliseconds, "predicted", f"time model of {product.machine.name}, both GEMMs{but}")


def _is_as_measured(layer: LayerPlan) -> bool:
    """Whether pairs that were measured beside vLLM are of such a layer: with SwiGLU, and without biases."""
    return isinstance(layer.request.activation, SwiGLUOAI) and layer.request.bias is Bias.NONE


def _floor(plan: ModelPlan, path: Path | None, tokens: int, active: float) -> float | None:
    """Every active expert's weights read once at the peak rate, or the rows' FLOPs without padding; the slower one.

    Args:
        plan: whose layer.
        path: what runs; None if nothing of ours does.
        tokens: T.
        active: local experts with a row; in the run that measured, where one did.
    """
    machine, shape = plan.serving.product.machine, plan.shape
    if machine is None or path is None or path.value not in PATHS:
        return None
    kernels = PATHS[path.value]
    weights = (1 + plan.model.activation.inputs) * shape.hidden * shape.intermediate
    reading = active * weights * kernels.weight_bytes / machine.memory_bandwidth
    rows = tokens * shape.top_k * shape.local_experts / shape.experts
    return 1e6 * max(reading, 2 * rows * weights / machine.matrix_flops[kernels.operand])
