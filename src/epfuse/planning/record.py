"""A plan as ``epfuse plan --json`` prints it and the planner's page shows it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from epfuse.errors import ConfigError
from epfuse.planning.layer_times import Rival, evidence, layer_times
from epfuse.planning.model_plan import ModelPlan, Serving, storages
from epfuse.policy.auto import expert_budget
from epfuse.weights.model_config import ExpertModel


def plan_record(plan: ModelPlan, rival: Rival | None) -> dict[str, Any]:
    """JSON-ready values: `ModelPlan.to_json`, memory, what would run otherwise, and times of one layer.

    Args:
        plan: the plan.
        rival: vLLM's experts; None if its choice is not known.
    """
    vllm = None if rival is None else {**asdict(rival), "evidence": evidence(plan, rival)}
    return {
        **plan.to_json(),
        "memory": memory(plan.model, plan.serving),
        "vllm": vllm,
        "times": [time.to_json() for time in layer_times(plan, rival)],
    }


def refused_record(model: ExpertModel, serving: Serving, refusal: ConfigError) -> dict[str, Any]:
    """What can be said of a plan that was refused: why, and where the ranks have an expert each, the bytes.

    Args:
        model: what was to be served.
        serving: how.
        refusal: what `plan_model` raised.
    """
    try:
        shape = serving.shape(model)
    except ConfigError:
        return {"refusal": str(refusal)}
    sizes = {storage.value: serving.bytes_of(model, storage) for storage in storages(model.checkpoint)}
    return {
        "refusal": str(refusal),
        "shape": asdict(shape),
        "bytes_per_rank": {**sizes, "chosen": None},
        "memory": memory(model, serving),
    }


def memory(model: ExpertModel, serving: Serving) -> dict[str, Any]:
    """A GPU's bytes, what experts may take of them, and which storages of all layers fit in that."""
    budget = expert_budget(serving.hbm_bytes)
    return {
        "hbm_bytes": serving.hbm_bytes,
        "expert_budget": budget,
        "fits": {storage.value: serving.bytes_of(model, storage) <= budget for storage in storages(model.checkpoint)},
    }
