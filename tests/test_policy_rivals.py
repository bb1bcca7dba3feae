"""Policy `auto` leaves a layer to whoever runs it already, unless epfuse is known to be faster."""

from __future__ import annotations

import json
import pathlib
from dataclasses import replace

import pytest

from epfuse import Path, Target
from epfuse.config import Bias, Policy
from epfuse.policy import Checkpoint, LayerPlan, LayerRequest, Storage, plan_layer
from epfuse.policy.rivals import CUT_SHORT, EVIDENCE
from tests.test_policy_auto import M3

RUNS = {
    (Target.SM90, "MarlinExperts", Path.W8A16): Checkpoint.MXFP8,
    (Target.SM90, "TritonExperts", Path.BF16): Checkpoint.BF16,
    (Target.SM90, "HummingGroupedExperts", Path.W8A16): Checkpoint.MXFP8,
    (Target.SM90, "HummingIndexedExperts", Path.W8A16): Checkpoint.MXFP8,
    (Target.GFX942, "Mxfp8EmulationTritonExperts", Path.W8A16): Checkpoint.MXFP8,
    (Target.GFX942, "block FP8 made of MXFP8", Path.W8A16): Checkpoint.MXFP8,
    (Target.GFX942, "TritonExperts", Path.BF16): Checkpoint.BF16,
    (Target.CPU, "Mxfp8EmulationTritonExperts", Path.W8A16): Checkpoint.MXFP8,
}
"""Every row of the table with the checkpoint that the rival reads."""


def planned(target: Target, rival: str | None, checkpoint: Checkpoint, **shape: int) -> LayerPlan:
    request: LayerRequest = replace(
        M3, target=target, rival=rival, checkpoint=checkpoint, shape=replace(M3.shape, **shape)
    )
    return plan_layer(request, Policy.AUTO)


def test_the_table_is_the_one_that_is_tested() -> None:
    assert set(RUNS) == set(EVIDENCE)


@pytest.mark.parametrize(("target", "rival", "path"), RUNS)
def test_a_layer_is_taken_where_there_is_evidence_and_the_reason_says_which(
    target: Target, rival: str, path: Path
) -> None:
    plan = planned(target, rival, RUNS[target, rival, path])
    assert not plan.is_untouched
    assert plan.reason.endswith(EVIDENCE[target, rival, path].reason)


@pytest.mark.parametrize(("target", "rival", "path"), RUNS)
@pytest.mark.parametrize("checkpoint", list(Checkpoint))
def test_what_is_known_of_one_path_says_nothing_of_another(
    target: Target, rival: str, path: Path, checkpoint: Checkpoint
) -> None:
    """Whatever the checkpoint makes of the layer: with the rival it is taken if its own paths have a row."""
    alone = planned(target, None, checkpoint)
    paths = {part.decision.path for part in alone.ranges}
    known = {other for on, beside, other in EVIDENCE if (on, beside) == (target, rival)}
    plan = planned(target, rival, checkpoint)
    assert plan.is_untouched is not (paths <= known)
    if plan.is_untouched:
        assert f"says that epfuse's {paths.pop().value} is faster than {rival} on {target.value}" in plan.reason


@pytest.mark.parametrize(
    ("target", "rival"),
    [
        (Target.GFX950, "Mxfp8NativeTritonExperts"),
        (Target.SM90, "DeepGemmExperts"),
        (Target.GFX942, "AiterMxfp8Experts"),
        (Target.CPU, "CPUExpertsFp8"),
    ],
)
def test_a_layer_is_left_where_there_is_none(target: Target, rival: str) -> None:
    plan = planned(target, rival, Checkpoint.MXFP8)
    assert plan.storage is Storage.UNTOUCHED
    assert not plan.ranges
    assert f"faster than {rival} on {target.value}" in plan.reason


def test_without_a_rival_a_layer_is_taken() -> None:
    plan = planned(Target.GFX950, None, Checkpoint.MXFP8)
    assert plan.at(1).path is Path.W8A16


def test_what_was_measured_of_the_hopper_kernels_says_nothing_of_the_portable_ones() -> None:
    assert planned(Target.SM90, "TritonExperts", Checkpoint.BF16, hidden=2944).storage is Storage.BF16
    plan = planned(Target.SM90, "TritonExperts", Checkpoint.BF16, hidden=2880)
    assert plan.is_untouched
    assert "H=2880" in plan.reason
    assert "multiples of 128: no measurement on NVIDIA H100" in plan.reason  # they run there, and nobody has timed it
    plan = planned(Target.SM90, "TritonExperts", Checkpoint.BF16, hidden=2888)
    assert plan.is_untouched
    assert "The Hopper kernels, which are faster than TritonExperts, don't run" in plan.reason
    assert "multiples of 16, not 2888" in plan.reason
    # on AMD there is one kernel for all sizes
    assert planned(Target.GFX942, "TritonExperts", Checkpoint.BF16, hidden=2880).storage is Storage.BF16
    # in fragment order MXFP8 is padded to whole fragments
    assert planned(Target.SM90, "MarlinExperts", Checkpoint.MXFP8, hidden=2880).storage is Storage.MXFP8


@pytest.mark.parametrize("product", [None, "NVIDIA H200", "NVIDIA H100 80GB HBM3"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(2880, 2880), (2880, 1440), (2880, 3072), (6144, 2880)])
def test_rows_that_are_no_whole_steps_need_evidence_of_their_sizes_and_product(
    product: str | None, hidden: int, intermediate: int
) -> None:
    """gpt-oss, whole; tensor parallelism cuts I, which nobody has timed."""
    request = replace(
        M3,
        target=Target.SM90,
        rival="TritonExperts",
        checkpoint=Checkpoint.BF16,
        bias=Bias.ADDED,
        device_name=product,
        shape=replace(M3.shape, hidden=hidden, intermediate=intermediate),
    )
    plan = plan_layer(request, Policy.AUTO)
    known = (product, hidden, intermediate) == ("NVIDIA H200", 2880, 2880)
    assert plan.is_untouched is not known
    if known:
        assert plan.reason.endswith(CUT_SHORT["NVIDIA H200", "TritonExperts", 2880, 2880])
    else:
        where = product or "NVIDIA H100 80GB HBM3"
        assert f"H={hidden} and I={intermediate} are no multiples of 128: no measurement on {where} says" in plan.reason


def test_what_is_said_of_gpt_oss_is_its_records() -> None:
    """Which had vLLM's own TritonExperts with biases in its own interface, and every check passed."""
    ratios = []
    for model in ("20b", "120b"):
        file = pathlib.Path(__file__).parents[1] / f"docs/records/2026-11-30-h200-vllm-gpt-oss-{model}.json"
        record = json.loads(file.read_text())
        assert record["ok"]
        assert record["bench"]["device"]["name"] == "NVIDIA H200"
        layer, times = record["bench"]["layer"], dict[tuple[str, int], float]()
        assert (layer["name"], layer["hidden"], layer["intermediate"]) == (f"gpt-oss-{model}-biases", 2880, 2880)
        for row in record["bench"]["rows"]:
            times[row["contender"], row["tokens"]] = row["time"]["median_us"]
        ratios += [times["EpfuseExperts", count] / us for (name, count), us in times.items() if name == "TritonExperts"]
    assert len(ratios) == 12
    said = CUT_SHORT["NVIDIA H200", "TritonExperts", 2880, 2880]
    assert f"take {min(ratios):.2f} to {max(ratios):.2f} of TritonExperts' time on an H200" in said


@pytest.mark.parametrize(
    ("rival", "peer"),
    [
        ("MarlinExperts", "vllm_marlin_tuned"),
        ("HummingGroupedExperts", "humming_w8a16_grouped"),
        ("HummingIndexedExperts", "humming_w8a16_indexed"),
    ],
)
def test_what_is_said_of_an_h200_is_its_record_s(rival: str, peer: str) -> None:
    record = pathlib.Path(__file__).parents[1] / "docs/records/2026-11-30-h200-peers.json"
    rows = json.loads(record.read_text())["rows"]
    ours, theirs = ({row["T"]: row["us"] for row in rows if row["peer"] == name} for name in ("impl", peer))
    ratios = [ours[tokens] / us for tokens, us in theirs.items()]
    said = EVIDENCE[Target.SM90, rival, Path.W8A16].reason
    h100, h200 = said.split(", ")
    assert "time on an H100" in h100
    assert h200.startswith(f"{min(ratios):.2f} to {max(ratios):.2f} on an H200 ")
