"""A model's plan: bytes, groups of layers, ranges, predictions, and what fewer ranks would change."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from epfuse import ExpertWeights, Path
from epfuse.config import (
    Activation,
    Bias,
    GELUTanh,
    LayerShape,
    Policy,
    ReLU2,
    SoftcappedSwiGLU,
    SwiGLUOAI,
    WeightFormat,
)
from epfuse.errors import ConfigError
from epfuse.expert_map import ExpertMap
from epfuse.families.family import CallKind
from epfuse.hardware.gpus import GIB
from epfuse.hardware.products import PRODUCTS
from epfuse.planning.console import fewer_ranks, show
from epfuse.planning.model_plan import ModelPlan, Serving, plan_model
from epfuse.planning.predict import CONCURRENCIES, chosen_ms, stored_ms
from epfuse.policy import Storage
from epfuse.target import Target
from epfuse.weights.block_fp8 import BlockFP8
from epfuse.weights.checkpoint_format import Checkpoint
from epfuse.weights.model_config import MINIMAX_M3

KEYS = {"policy", "target", "shape", "ranks", "layers", "ranges", "bytes_per_rank", "refused"}


def plan(device: str = "mi300x", ep_size: int = 8, length: int = 9472, policy: Policy = Policy.AUTO) -> ModelPlan:
    product = PRODUCTS[device]
    return plan_model(MINIMAX_M3, Serving(product, ep_size, length, product.hbm_bytes), policy)


@pytest.mark.parametrize("device", list(PRODUCTS))
@pytest.mark.parametrize("policy", list(Policy))
def test_minimax_m3_ep8_is_103_gb_bf16_a_rank_against_53_gb_mxfp8_with_scales(device: str, policy: Policy) -> None:
    found = plan(device, policy=policy).to_json()["bytes_per_rank"]
    assert round(found["bf16"] / 1e9, 1) == 103.3
    assert round(found["mxfp8"] / 1e9, 1) == 53.3
    assert found["hybrid"] == found["bf16"] + found["mxfp8"]


# The six serving points of MI300X: 1k in, 1k out and 8k in, 1k out, each at 1, 16 and 256 concurrent requests.
POINTS = [(length, name) for length in (2304, 9472) for name in CONCURRENCIES]


@pytest.mark.parametrize(("length", "point"), POINTS)
def test_the_seeds_decisions_at_its_six_serving_points(length: int, point: str) -> None:
    found = plan(length=length, policy=Policy.SEED_1782)
    (kind,) = found.kinds()
    path = kind.at(CONCURRENCIES[point]).path
    if length == 2304:
        assert kind.storage is Storage.HYBRID
        assert path is (Path.BF16 if point == "c1" else Path.W8A8)
    else:
        assert kind.storage is Storage.BF16
        assert path is Path.BF16


@pytest.mark.parametrize("device", ["mi300x", "h100", "h200"])
@pytest.mark.parametrize(("length", "point"), POINTS)
def test_autos_decisions_at_the_six_serving_points(device: str, length: int, point: str) -> None:
    found = plan(device, length=length)
    (kind,) = found.kinds()
    assert (kind.storage, kind.at(CONCURRENCIES[point]).path) == (Storage.MXFP8, Path.W8A16)


@pytest.mark.parametrize("policy", list(Policy))
def test_json_has_the_documented_keys(policy: Policy) -> None:
    record = plan(policy=policy).to_json()
    assert set(record) == KEYS
    assert all(set(entry) == {"from", "to", "storage", "bytes"} for entry in record["layers"])
    assert all(set(e) == {"min_tokens", "max_tokens", "path", "kernels", "tile", "reason"} for e in record["ranges"])
    assert set(record["bytes_per_rank"]) == {"bf16", "mxfp8", "hybrid", "chosen"}
    assert record["refused"]
    assert all(set(entry) == {"path", "reason"} for entry in record["refused"])


def test_groups_are_adjacent_layers_with_one_plan() -> None:
    product = replace(PRODUCTS["mi300x"], gpu=replace(PRODUCTS["mi300x"].gpu, memory_bytes=4000 * GIB))
    found = plan_model(MINIMAX_M3, Serving(product, 1, 9472, product.hbm_bytes), Policy.SEED_1782)
    layers = [index for group in found.groups for index in group.layers]
    assert layers == list(MINIMAX_M3.moe_layers)
    alone = [group.layers for group in found.groups if group.plan.storage is Storage.BF16]
    assert alone == [(index,) for index in range(5, 60, 5)]
    assert found.chosen_bytes == 46 * Storage.HYBRID.bytes_of(found.shape) + 11 * Storage.BF16.bytes_of(found.shape)
    assert {entry["reason"].split(":")[0] for entry in found.to_json()["ranges"]} == {
        "Layers that keep bf16",
        "Layers that keep hybrid",
    }


def test_untouched_layers_have_no_bytes_of_ours() -> None:
    record = plan("h100", policy=Policy.SEED_1782).to_json()
    assert record["layers"] == [{"from": 3, "to": 59, "storage": "untouched", "bytes": None}]
    assert record["ranges"] == []
    assert record["bytes_per_rank"]["chosen"] is None
    assert {entry["reason"] for entry in record["refused"]} == {"The target is sm_90; the profiled layer has gfx942."}


def test_predicted_times_are_those_of_the_time_model() -> None:
    found = plan()
    times = {s: [round(stored_ms(found, s, t) or 0, 2) for t in CONCURRENCIES.values()] for s in (Storage.BF16,)}
    assert times[Storage.BF16] == [3.12, 9.4, 29.24]  # docs/mi300x.md
    assert [round(chosen_ms(found, tokens) or 0, 2) for tokens in CONCURRENCIES.values()] == [2.6, 5.84, 16.11]
    assert chosen_ms(plan("mi355x"), 1) is None
    assert chosen_ms(plan("h100", policy=Policy.SEED_1782), 1) is None


def test_four_ranks_instead_of_eight() -> None:
    text = fewer_ranks(plan())
    assert text.startswith("4 ranks instead of 8: bf16 206.6 GB (does not fit), mxfp8 106.5 GB (fits)")
    assert "The plan would be: mxfp8" in text
    assert "The plan would be refused" in fewer_ranks(plan("h100"))
    assert "The EP size is 4" in fewer_ranks(plan(policy=Policy.SEED_1782))
    assert "no half" in fewer_ranks(plan(ep_size=1, policy=Policy.SEED_1782))


def test_what_can_not_be_served_is_refused() -> None:
    product = PRODUCTS["h100"]
    with pytest.raises(ConfigError, match="ep_size is 129; it must be in"):
        plan_model(MINIMAX_M3, Serving(product, 129, 9472, product.hbm_bytes), Policy.AUTO)
    dense = replace(MINIMAX_M3, checkpoint=Checkpoint.BF16)
    with pytest.raises(ConfigError, match="103\\.3 GB a rank as bf16"):
        plan_model(dense, Serving(product, 8, 9472, product.hbm_bytes), Policy.AUTO)


def test_experts_that_ranks_do_not_divide_count_for_the_rank_that_holds_more() -> None:
    model = replace(MINIMAX_M3, experts=60)
    found = plan_model(model, Serving(PRODUCTS["mi300x"], 8, 9472, PRODUCTS["mi300x"].hbm_bytes), Policy.AUTO)
    maps = [ExpertMap.contiguous(60, 8, rank).num_local for rank in range(8)]
    assert found.shape.local_experts == max(maps) == 8
    assert found.to_json()["ranks"] == [{"ranks": 4, "local_experts": 8}, {"ranks": 4, "local_experts": 7}]
    assert sum(entry["ranks"] * entry["local_experts"] for entry in found.to_json()["ranks"]) == 60
    assert found.stored_bytes(Storage.BF16) == 57 * 8 * 3 * 6144 * 3072 * 2
    console = Console(width=200, file=io.StringIO())
    show(found, None, console)
    assert "4 hold 8, 4 hold 7 experts" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("device", list(PRODUCTS))
def test_block_fp8_is_planned_as_block_fp8(device: str) -> None:
    model = replace(MINIMAX_M3, checkpoint=Checkpoint.BLOCK_FP8)
    product = PRODUCTS[device]
    found = plan_model(model, Serving(product, 8, 9472, product.hbm_bytes), Policy.AUTO)
    (kind,) = found.kinds()
    assert (kind.storage, {entry.decision.path for entry in kind.ranges}) == (Storage.BLOCK_FP8, {Path.BLOCK_FP8})
    weights = BlockFP8.quantize(torch.zeros(1, 2 * 256, 320)), BlockFP8.quantize(torch.zeros(1, 320, 256))
    held = sum(t.numel() * t.element_size() for w in weights for t in (w.values, w.scales))
    assert Storage.BLOCK_FP8.bytes_of(LayerShape(320, 256, 1, 1, 1)) == held
    assert found.to_json()["bytes_per_rank"]["block_fp8"] == found.chosen_bytes


def test_block_fp8_whose_gate_and_up_share_blocks_becomes_bf16() -> None:
    model = replace(MINIMAX_M3, checkpoint=Checkpoint.BLOCK_FP8, intermediate=3000)
    found = plan_model(model, Serving(PRODUCTS["mi300x"], 8, 9472, PRODUCTS["mi300x"].hbm_bytes), Policy.AUTO)
    assert found.kinds()[0].storage is Storage.BF16


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weights_input": True}, "The router weight is applied to the inputs."),
        ({"dtype": "float16"}, "Activations are torch.float16"),
    ],
)
@pytest.mark.parametrize("policy", list(Policy))
def test_what_the_layer_can_not_compute_is_not_promised(changes: dict[str, Any], reason: str, policy: Policy) -> None:
    model = replace(MINIMAX_M3, checkpoint=Checkpoint.BF16, **changes)
    found = plan_model(model, Serving(PRODUCTS["mi300x"], 8, 9472, PRODUCTS["mi300x"].hbm_bytes), policy)
    assert all(kind.is_untouched and kind.reason.startswith(reason) for kind in found.kinds())
    assert found.chosen_bytes is None


@pytest.mark.parametrize("bias", list(Bias))
@pytest.mark.parametrize("activation", [SwiGLUOAI(), GELUTanh(), SoftcappedSwiGLU(4.0, 25.0), ReLU2()])
@pytest.mark.parametrize("checkpoint", [Checkpoint.BF16, Checkpoint.MXFP8])
def test_every_activation_and_biases_are_planned_on_kernels_that_take_them(
    checkpoint: Checkpoint, activation: Activation, bias: Bias
) -> None:
    """In the bytes that `ExpertWeights` takes."""
    model = replace(MINIMAX_M3, checkpoint=checkpoint, activation=activation, has_bias=bias is Bias.ADDED)
    form = WeightFormat.DENSE if checkpoint is Checkpoint.BF16 else WeightFormat.MXFP8
    for product in PRODUCTS.values():
        found = plan_model(model, Serving(product, 16, 9472, product.hbm_bytes), Policy.AUTO)
        (kind,) = found.kinds()
        weights = ExpertWeights.without_data(form, found.shape, activation=type(activation), bias=bias)
        held = sum(weights.nbytes.values()) + sum(tensor.nbytes for _, tensor in weights.biases)
        assert kind.nbytes == held, product.device_name
        families = []
        for entry in kind.ranges:
            decision = entry.decision
            assert decision.family is not None
            assert decision.weights is not None
            calls = CallKind(decision.path, product.target, found.shape, activation=type(activation), bias=bias)
            assert decision.family.accepts(calls.on(decision.path, decision.weights)) is None
            families.append(decision.family)
        portable = product.target is Target.SM90 and any(family.every_gpu for family in families)
        assert ("The portable kernels run it: " in kind.reason) == portable, kind.reason
        assert portable or product.target is not Target.SM90 or isinstance(activation, SwiGLUOAI)


def test_layers_with_another_activation_are_planned_for_themselves() -> None:
    model = replace(MINIMAX_M3, other_activations=((58, None), (59, None)))
    found = plan_model(model, Serving(PRODUCTS["mi300x"], 8, 9472, PRODUCTS["mi300x"].hbm_bytes), Policy.AUTO)
    assert [(group.layers[0], group.layers[-1], group.plan.is_untouched) for group in found.groups] == [
        (3, 57, False),
        (58, 59, True),
    ]


def test_every_product_is_of_a_target_with_a_name_of_its_own() -> None:
    assert PRODUCTS["mi325x"].target is Target.GFX942
    assert PRODUCTS["mi325x"].hbm_bytes == 256 * GIB
    assert len({product.device_name for product in PRODUCTS.values()}) == len(PRODUCTS)
