"""The planner's data: a record for every named model, GPU and number of ranks."""

from __future__ import annotations

import json
import logging
from typing import Any

from epfuse.cli.plan import rival_of
from epfuse.config import Policy
from epfuse.errors import ConfigError
from epfuse.hardware.products import PRODUCTS
from epfuse.planning.model_plan import Serving, plan_model
from epfuse.planning.page import asset, device_entry, index, model_entry
from epfuse.planning.record import plan_record, refused_record
from epfuse.weights.model_config import ExpertModel
from epfuse.weights.named_models import named_models

FOLDER = "planner"
RANKS = (1, 2, 4, 8, 16, 32)
MAX_MODEL_LEN = 9472
"""Policy auto does not look at it."""


def pages() -> dict[str, str]:
    """File -> its text."""
    logging.getLogger("epfuse").setLevel(logging.ERROR)  # that tiles are another product's stands in the record
    models = [model_entry(name, named.model, named.source) for name, named in named_models().items()]
    devices = [device_entry(name, product.hbm_bytes) for name, product in PRODUCTS.items()]
    found = {f"{FOLDER}/{name}": asset(name) for name in ("planner.js", "planner.css")}
    found[f"{FOLDER}/data/index.json"] = json.dumps(index(models, devices, RANKS, MAX_MODEL_LEN))
    for name, named in named_models().items():
        for device in PRODUCTS:
            ranks = {str(count): record(named.model, device, count) for count in RANKS}
            found[f"{FOLDER}/data/{name}/{device}.json"] = json.dumps(ranks, allow_nan=False, separators=(",", ":"))
    return found


def record(model: ExpertModel, device: str, ranks: int) -> dict[str, Any]:
    """What ``epfuse plan --json`` says, or why it refuses."""
    product = PRODUCTS[device]
    serving = Serving(product, ranks, MAX_MODEL_LEN, product.hbm_bytes)
    try:
        plan = plan_model(model, serving, Policy.AUTO)
    except ConfigError as refusal:
        return refused_record(model, serving, refusal)
    return plan_record(plan, rival_of(model, serving))
