"""The planner's page of one plan, and the data that the page of many plans is made from."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from epfuse import __version__
from epfuse.hardware.products import PRODUCTS
from epfuse.planning.layer_times import TOKENS, Rival
from epfuse.planning.model_plan import ModelPlan, Serving
from epfuse.planning.record import plan_record
from epfuse.report.page import render
from epfuse.weights.model_config import ExpertModel


def asset(name: str) -> str:
    """``planner.js`` or ``planner.css``, as text."""
    return resources.files("epfuse.report").joinpath("planner", name).read_text(encoding="utf-8")


def model_entry(name: str, model: ExpertModel, source: str) -> dict[str, Any]:
    """A model in the page's index.

    Args:
        name: as ``--config`` takes it.
        model: its experts.
        source: where its sizes are from.
    """
    return {
        "name": name,
        "source": source,
        "checkpoint": model.checkpoint.value,
        "hidden": model.hidden,
        "intermediate": model.intermediate,
        "experts": model.experts,
        "top_k": model.top_k,
        "moe_layers": len(model.moe_layers),
    }


def device_entry(name: str, hbm_bytes: int) -> dict[str, Any]:
    """A GPU in the page's index, by its key in `PRODUCTS`."""
    return {"name": name, "title": PRODUCTS[name].device_name, "hbm_bytes": hbm_bytes}


def index(
    models: list[dict[str, Any]], devices: list[dict[str, Any]], ranks: tuple[int, ...], max_model_len: int
) -> dict[str, Any]:
    """What the page lets people choose from."""
    return {
        "models": models,
        "devices": devices,
        "ranks": list(ranks),
        "tokens": list(TOKENS),
        "max_model_len": max_model_len,
    }


def page(name: str, source: str, plan: ModelPlan, rival: Rival | None) -> str:
    """One plan as a page that needs nothing else.

    Args:
        name: what ``--config`` named.
        source: where the model's sizes are from.
        plan: the plan.
        rival: what vLLM would choose; None if that is not known.
    """
    serving: Serving = plan.serving
    device = next(key for key, product in PRODUCTS.items() if product is serving.product)
    found = {
        "index": index(
            [model_entry(name, plan.model, source)],
            [device_entry(device, serving.hbm_bytes)],
            (serving.ep_size,),
            serving.max_model_len,
        ),
        "records": {f"{name}/{device}": {str(serving.ep_size): plan_record(plan, rival)}},
    }
    return render(
        "plan.html.j2",
        title=f"{name} on {serving.ep_size} x {serving.product.device_name}",
        version=__version__,
        policy=plan.policy.value,
        css=asset("planner.css"),
        js=asset("planner.js"),
        data=json.dumps(found, allow_nan=False).replace("<", "\\u003c"),  # or a text could end the script
    )
