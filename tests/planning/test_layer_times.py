"""One layer's times: measured ones are a record's, predicted ones the time model's, and nothing else has a number."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from tools import beside_vllm

from epfuse.cli.plan import rival_of
from epfuse.config import GELUTanh, Policy
from epfuse.errors import ConfigError
from epfuse.hardware.products import PRODUCTS
from epfuse.planning.layer_times import NOT_FITTED, TOKENS, PlannedLayerTime, Rival, layer_times
from epfuse.planning.model_plan import ModelPlan, Serving, plan_model
from epfuse.planning.page import page
from epfuse.planning.record import plan_record, refused_record
from epfuse.weights.model_config import MINIMAX_M3
from epfuse.weights.named_models import named_models


def planned(device: str, ranks: int = 8, name: str = "minimax-m3") -> tuple[ModelPlan, Rival | None]:
    model, product = named_models()[name].model, PRODUCTS[device]
    serving = Serving(product, ranks, 9472, product.hbm_bytes)
    return plan_model(model, serving, Policy.AUTO), rival_of(model, serving)


def at(tokens: int, device: str, ranks: int = 8, name: str = "minimax-m3") -> PlannedLayerTime:
    return layer_times(*planned(device, ranks, name))[TOKENS.index(tokens)]


def test_the_rows_are_those_of_the_records() -> None:
    assert beside_vllm.OUT.read_text(encoding="utf-8") == beside_vllm.text()
    assert len(beside_vllm.rows()) > 50


@pytest.mark.parametrize(("device", "tokens", "ours", "theirs"), [("h200", 256, 235.5, 280.6), ("h100", 1, 35.0, 65.3)])
def test_measured_beside_humming_as_in_docs_performance(device: str, tokens: int, ours: float, theirs: float) -> None:
    found = at(tokens, device)
    assert found.ours is not None
    assert found.theirs is not None
    assert (found.ours.kind, found.theirs.kind) == ("measured", "measured")
    assert found.ours.source == found.theirs.source
    assert round(found.ours.microseconds, 1) == ours
    assert round(found.theirs.microseconds, 1) == theirs
    assert found.floor is not None
    assert found.floor < found.ours.microseconds


def test_a_tuned_row_of_this_product_and_layer_is_a_measurement() -> None:
    found = at(4096, "h100")  # humming was not timed there
    assert found.theirs is None
    assert found.ours is not None
    assert (found.ours.kind, round(found.ours.microseconds, 1)) == ("measured", 459.2)
    later = at(128, "h200").ours
    assert later is not None
    assert (later.kind, round(later.microseconds, 1)) == ("measured", 215.5)
    between = at(4096, "h200", 4).ours
    assert between is not None
    assert between.kind == "predicted"


def test_mi300x_is_predicted_as_in_docs_mi300x() -> None:
    for tokens in TOKENS:
        found = at(tokens, "mi300x")
        assert found.ours is not None
        assert found.theirs is not None
        assert (found.ours.kind, found.theirs.kind) == ("predicted", "predicted")
    found = at(256, "mi300x")
    assert found.ours is not None
    assert found.theirs is not None
    assert 0.5 < found.ours.microseconds / found.theirs.microseconds < 0.9


@pytest.mark.parametrize("device", ["h100", "h200", "mi300x", "mi325x"])
@pytest.mark.parametrize("name", ["minimax-m3", "qwen3-235b-a22b-fp8", "mixtral-8x7b"])
def test_nothing_is_faster_than_its_floor(device: str, name: str) -> None:
    for found in layer_times(*planned(device, 8, name)):
        if found.ours is not None and found.floor is not None and found.ours.kind == "measured":
            assert found.ours.microseconds > found.floor


def test_where_nothing_is_known_there_is_no_number() -> None:
    found = at(64, "mi355x")
    assert (found.ours, found.theirs, found.floor) == (None, None, None)
    assert at(64, "h200", 8, "qwen3-235b-a22b-fp8").theirs is None  # vLLM's class is not known


def test_gpt_oss_is_predicted_for_the_kernels_that_run_it_and_the_plugin_is_said_to_leave_it() -> None:
    plan, rival = planned("h200", 2, "gpt-oss-120b")
    assert rival is not None
    assert rival.plugin.startswith("epfuse's vLLM plugin leaves these layers to vLLM: ")
    portable = plan.groups[0].plan.why_portable is not None
    for found in layer_times(plan, rival):
        assert found.ours is not None
        assert found.floor is not None
        assert (found.path, found.ours.kind) == ("w8a16", "predicted")
        assert (NOT_FITTED in found.ours.source) == portable
        assert found.ours.microseconds > found.floor
    other = planned("h200")[1]
    assert other is not None
    assert other.plugin == "epfuse's vLLM plugin takes these layers."


def test_what_was_measured_without_biases_is_not_said_of_a_layer_with_them() -> None:
    product = PRODUCTS["h200"]
    serving = Serving(product, 8, 9472, product.hbm_bytes)
    for changes in ({"has_bias": True}, {"activation": GELUTanh()}):
        plan = plan_model(replace(MINIMAX_M3, **changes), serving, Policy.AUTO)  # type: ignore[arg-type]
        kinds = {found.ours.kind for found in layer_times(plan, rival_of(MINIMAX_M3, serving)) if found.ours}
        assert kinds == {"predicted"}


def test_the_record_says_what_fits() -> None:
    record = plan_record(*planned("mi300x"))
    assert record["memory"]["fits"] == {"bf16": True, "mxfp8": True, "hybrid": True}
    assert record["vllm"]["name"] == "Mxfp8EmulationTritonExperts"
    assert "predicted" in record["vllm"]["evidence"]
    assert [time["tokens"] for time in record["times"]] == list(TOKENS)


def test_a_refused_plan_still_has_its_bytes() -> None:
    product = PRODUCTS["h100"]
    for ranks, has_bytes in ((2, True), (256, False)):
        serving = Serving(product, ranks, 9472, product.hbm_bytes)
        with pytest.raises(ConfigError) as refusal:
            plan_model(MINIMAX_M3, serving, Policy.AUTO)
        record = refused_record(MINIMAX_M3, serving, refusal.value)
        assert record["refusal"] == str(refusal.value)
        assert ("bytes_per_rank" in record) == has_bytes
        if has_bytes:
            assert not any(record["memory"]["fits"].values())


def test_a_hostile_name_stays_text() -> None:
    plan, rival = planned("h200")
    evil = "</script><script>alert(1)</script>"
    text = page(evil, evil, replace(plan, model=replace(plan.model, name=evil)), rival)
    assert evil not in text
    assert "<script>alert" not in text
    (inside,) = (part.partition("</script>")[0] for part in text.split('id="planner-data">')[1:])
    found: dict[str, Any] = json.loads(inside)
    assert found["index"]["models"][0]["name"] == evil
