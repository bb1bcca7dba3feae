"""Policy `auto`: what is stored, by checkpoint and memory, and what runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from epfuse import LayerShape, Path, Target
from epfuse.config import Policy
from epfuse.errors import ConfigError
from epfuse.policy import Checkpoint, LayerPlan, LayerRequest, Storage, auto, plan_layer
from epfuse.policy.call import CallTable
from epfuse.policy.decision import Decision

GIB = 2**30
M3 = LayerRequest(
    target=Target.GFX942,
    shape=LayerShape(hidden=6144, intermediate=3072, experts=128, local_experts=16, top_k=4),
    ep_size=8,
    max_model_len=9472,
    layer=3,
    moe_layers=tuple(range(3, 60)),
    shared_experts=1,
)
GPUS = [target for target in Target if target.is_gpu]


def planned(**changes: Any) -> LayerPlan:
    return plan_layer(replace(M3, **changes), Policy.AUTO)


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("checkpoint", [Checkpoint.MXFP8, Checkpoint.MXFP4])
def test_what_mxfp8_holds_exactly_is_kept_as_mxfp8_alone(target: Target, checkpoint: Checkpoint) -> None:
    plan = planned(target=target, checkpoint=checkpoint)
    assert plan.storage is Storage.MXFP8
    assert {entry.decision.path for entry in plan.ranges} == {Path.W8A16}
    assert {storage for storage, _ in plan.refused_storage} == {Storage.BF16, Storage.HYBRID}


@pytest.mark.parametrize("target", GPUS)
def test_a_bf16_checkpoint_is_not_rounded(target: Target) -> None:
    plan = planned(target=target, checkpoint=Checkpoint.BF16)
    assert plan.storage is Storage.BF16
    assert {entry.decision.path for entry in plan.ranges} == {Path.BF16}
    assert all("round" in reason for _, reason in plan.refused_storage)


@pytest.mark.parametrize(
    ("checkpoint", "path"),
    [(Checkpoint.MXFP8, Path.W8A16), (Checkpoint.BLOCK_FP8, Path.W8A16), (Checkpoint.BF16, Path.BF16)],
)
def test_a_cpu_runs_its_own_family(checkpoint: Checkpoint, path: Path) -> None:
    plan = planned(target=Target.CPU, checkpoint=checkpoint)
    assert [entry.decision.path for entry in plan.ranges] == [path]


def test_sizes_that_mxfp8_has_no_groups_for_are_kept_in_bf16() -> None:
    plan = planned(shape=replace(M3.shape, hidden=6160))
    assert plan.storage is Storage.BF16
    assert "H=6160" in plan.reason


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize(
    "shape",
    [
        LayerShape(hidden=2880, intermediate=2880, experts=128, local_experts=16, top_k=4),
        LayerShape(hidden=4096, intermediate=384, experts=64, local_experts=8, top_k=6),
        LayerShape(hidden=32, intermediate=32, experts=8, local_experts=1, top_k=1),
    ],
)
def test_any_shape_of_whole_groups_is_planned(target: Target, shape: LayerShape) -> None:
    plan = planned(target=target, shape=shape)
    assert plan.storage is Storage.MXFP8
    assert plan.at(1).path is plan.at(10**6).path is Path.W8A16


def test_ranges_have_no_gaps() -> None:
    for target in GPUS:
        ranges = planned(target=target).ranges
        assert ranges[0].min_tokens == 1
        assert ranges[-1].max_tokens is None
        for entry, after in itertools.pairwise(ranges):
            assert entry.max_tokens is not None
            assert after.min_tokens == entry.max_tokens + 1


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    # M3 on 4 ranks: 206.6 GB as BF16, 106.5 GB as MXFP8
    four = replace(M3.shape, local_experts=32)
    assert planned(shape=four, ep_size=4, hbm_bytes=192 * GIB).storage is Storage.MXFP8
    with pytest.raises(ConfigError, match=r"206\.6 GB a rank as bf16.*more ranks"):
        planned(shape=four, ep_size=4, hbm_bytes=192 * GIB, checkpoint=Checkpoint.BF16)
    with pytest.raises(ConfigError, match=r"106\.5 GB a rank as mxfp8"):
        planned(shape=four, ep_size=4, hbm_bytes=80 * GIB)


def table(*entries: tuple[int, float]) -> CallTable:
    decisions = tuple(Decision(Path.BF16, measured_us=microseconds) for _, microseconds in entries)
    return CallTable(tuple(first for first, _ in entries), decisions)


MEASURED = {
    Path.BF16: table((1, 40.0), (33, 600.0), (513, 700.0)),
    Path.W8A16: table((1, 35.0), (33, 300.0), (513, 800.0), (4097, 690.0)),
}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """BF16 is 1.14 times as fast as W8A16 from 513 to 4096 tokens, and nowhere else."""
    monkeypatch.setattr(auto, "call_table", lambda kind: MEASURED[kind.path])
    auto._gains.cache_clear()
    yield
    auto._gains.cache_clear()


@pytest.mark.usefixtures("measured")
def test_a_bf16_copy_that_pays_and_fits_is_kept_and_used_where_it_pays() -> None:
    plan = planned()
    assert plan.storage is Storage.HYBRID
    paths = {tokens: plan.at(tokens).path for tokens in (1, 512, 513, 4096, 4097)}
    assert paths == {1: Path.W8A16, 512: Path.W8A16, 513: Path.BF16, 4096: Path.BF16, 4097: Path.W8A16}
    assert "1.14 times as fast" in plan.at(513).reason


@pytest.mark.usefixtures("measured")
def test_a_copy_goes_to_as_many_layers_as_there_is_room_for() -> None:
    # 0.8 * 96 GiB = 82.5 GB: beside 53.3 GB of MXFP8 there is room for 16 copies of 1.81 GB
    kept = [planned(layer=layer, hbm_bytes=96 * GIB) for layer in M3.moe_layers]
    assert [plan.storage for plan in kept] == [Storage.HYBRID] * 16 + [Storage.MXFP8] * 41
    assert "no more than 16 of 57 layers" in kept[-1].reason


def test_what_is_stored_already_is_used() -> None:
    plan = planned(stored=Storage.BF16)
    assert plan.storage is Storage.BF16
    assert plan.at(64).path is Path.BF16


def test_auto_plans_nothing_that_is_not_its_own() -> None:
    with pytest.raises(ConfigError, match="untouched"):
        planned(stored=Storage.UNTOUCHED)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ep_size": 4}, "ep_size is 4; the layer has L=16 of E=128 experts, and a rank of 4 holds 32"),
        ({"layer": 2}, "layer is 2"),
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"hbm_bytes": 0}, "hbm_bytes is 0"),
    ],
)
def test_requests_that_contradict_themselves(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(M3, **changes)


def test_token_counts_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="tokens is 0"):
        planned().at(0)
