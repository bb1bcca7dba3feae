"""Predicted times of the two expert GEMMs of a step, over all layers, from the time model."""

from __future__ import annotations

from dataclasses import replace

from epfuse.arguments import checks_enums
from epfuse.config import Path
from epfuse.errors import ConfigError
from epfuse.hardware.time_model import PATHS, predicted_ms
from epfuse.planning.model_plan import ModelPlan
from epfuse.policy import CallKind, Decision, Storage, decide

CONCURRENCIES = {"c1": 1, "c16": 16, "c256": 216}
"""Requests in flight -> T of a decode step. Of 256, 216 were active in the published profile (`hardware.published`)."""

STORED_PATHS: dict[Storage, tuple[Path, ...]] = {
    Storage.BF16: (Path.BF16,),
    Storage.MXFP8: (Path.W8A16,),
    Storage.HYBRID: (Path.BF16, Path.W8A16),
    Storage.BLOCK_FP8: (Path.BLOCK_FP8,),
}
"""What could run on each storage; an activation is rounded to FP8 only where nothing else reads the weights."""


@checks_enums
def stored_ms(plan: ModelPlan, storage: Storage, tokens: int) -> float | None:
    """Milliseconds a step if every layer were stored so; of several paths the fastest; None without a machine."""
    times = [_path_ms(plan, path, tokens) for path in STORED_PATHS[storage]]
    return min((time for time in times if time is not None), default=None)


def chosen_ms(plan: ModelPlan, tokens: int) -> float | None:
    """Milliseconds a step of the plan itself; None without a machine, or if a layer is untouched."""
    total = 0.0
    for group in plan.groups:
        if group.plan.is_untouched:
            return None
        time = _milliseconds(plan, group.plan.at(tokens), tokens, len(group.layers))
        if time is None:
            return None
        total += time
    return total


def _path_ms(plan: ModelPlan, path: Path, tokens: int) -> float | None:
    product = plan.serving.product
    activation, bias, device = type(plan.model.activation), plan.model.bias, product.device_name
    kind = CallKind(path, product.target, plan.shape, activation=activation, bias=bias, device_name=device)
    kept = Storage.HYBRID.formats(kind) | Storage.BLOCK_FP8.formats(kind)
    decision = decide(replace(kind, formats=kept), tokens)
    return _milliseconds(plan, decision, tokens, len(plan.model.moe_layers))


def _milliseconds(plan: ModelPlan, decision: Decision, tokens: int, layers: int) -> float | None:
    machine = plan.serving.product.machine
    if machine is None:
        return None
    if decision.tiles is None:
        raise ConfigError(f"path {decision.path.value!r} has no kernels whose time could be predicted")
    kernels = replace(PATHS[decision.path.value], block_m=decision.tiles.block_m)
    routing, inputs = plan.serving.product.routing, plan.model.activation.inputs
    return predicted_ms(machine, kernels, plan.shape, tokens, routing, layers, inputs)
