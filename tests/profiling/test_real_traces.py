"""Traces of real runs: an MI300X server, and a small model on an H100 (tests/data/README.md)."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from epfuse.profiling.classify import Classifier
from epfuse.profiling.phases import Phase
from epfuse.profiling.profile import profile_trace
from epfuse.profiling.read_trace import read_trace
from epfuse.profiling.record import PhaseTotal, Profile
from epfuse.profiling.shapes import SHAPES
from tests.profiling.traces import DATA, MI300X

GEMM = "_matmul_ogs_NNT_bf16xbf16xmxfp4_16x128x256x1"


@pytest.fixture(scope="module")
def mi300x(classifier: Classifier) -> Profile:
    (profile,) = profile_trace(read_trace(MI300X), classifier, shape=SHAPES["gpt-oss-20b"])
    return profile


def phase_of(profile: Profile, phase: Phase) -> PhaseTotal:
    return next(total for total in profile.phases if total.phase is phase)


def test_all_of_the_servers_kernels_are_counted(mi300x: Profile) -> None:
    with gzip.open(MI300X) as file:
        events = json.load(file)["traceEvents"]
    durations = [event["dur"] for event in events if event.get("cat") == "kernel"]
    assert mi300x.kernels_total == mi300x.kernels_in_trace == len(durations) == 425
    assert sum(phase.calls for phase in mi300x.phases) == 425
    assert mi300x.unclassified == []
    assert mi300x.coverage == 1
    assert sum(phase.ns for phase in mi300x.phases) == mi300x.time.kernel_sum
    assert mi300x.time.kernel_sum / 1000 == pytest.approx(sum(durations), abs=0.2)


def test_the_expert_gemms_are_told_apart(mi300x: Profile) -> None:
    first, second = phase_of(mi300x, Phase.GEMM1), phase_of(mi300x, Phase.GEMM2)
    assert [(k.name, k.calls) for k in first.kernels] == [(f"{GEMM}_swiglu", 24)]
    assert [(k.name, k.calls) for k in second.kernels] == [(GEMM, 24)]
    assert first.ns / 1000 == pytest.approx(3272.7, abs=0.1)
    assert second.ns / 1000 == pytest.approx(3761.9, abs=0.1)


def test_calls_of_each_phase(mi300x: Profile) -> None:
    assert {phase.phase: phase.calls for phase in mi300x.phases} == {
        Phase.INPUT: 2,
        Phase.NORM: 24 + 24 + 24 + 24 + 1 + 23,  # two norms a layer and the last, RoPE, cache; a cast in all but one
        Phase.PROJECTION: 48,
        Phase.ATTENTION: 36,  # the layers with full attention reduce its segments
        Phase.ROUTER: 48,
        Phase.PREPARE: 96,
        Phase.GEMM1: 24,
        Phase.GEMM2: 24,
        Phase.COMBINE: 24,
        Phase.OUTPUT: 3,
    }


def test_its_layers(mi300x: Profile) -> None:
    assert (len(mi300x.layers), mi300x.layers_found_by) == (24, "repetition")
    assert all(layer.phases[Phase.GEMM1] and layer.phases[Phase.GEMM2] for layer in mi300x.layers)
    assert sum(layer.span for layer in mi300x.layers) < mi300x.time.span
    p50, p95 = mi300x.layer_span(0.5), mi300x.layer_span(0.95)
    assert p50 == pytest.approx(432_300, abs=100)
    assert p95 is not None
    assert p50 is not None
    assert p50 < p95
    counts = {len(mi300x.timeline)}
    assert counts <= {16, 17}  # 15 of each layer; a cast and a reduction in some


def test_its_step_device_and_time(mi300x: Profile) -> None:
    (step,) = mi300x.window
    assert (step.label.kind.value, step.label.requests, step.label.tokens) == ("decode", 32, 32)
    assert (mi300x.product, mi300x.device.multiprocessors, mi300x.device.index) == ("MI300X", 304, 2)
    time = mi300x.time
    assert len(time.streams) == 1
    assert time.overlap == 0
    assert time.span - time.busy == time.streams[0].gaps.device == 25_473  # in decimal arithmetic too
    assert time.copies == 9


def test_its_experts_against_memory(mi300x: Profile) -> None:
    view = mi300x.experts
    assert view is not None
    assert (view.weights, view.weights_from) == ("mxfp4", "the kernels' names")
    assert view.active_experts == pytest.approx(32 * (1 - (28 / 32) ** 32))
    gemm1, gemm2 = view.gemms
    assert gemm1.bytes / 1e9 == pytest.approx(6.71, abs=0.01)
    assert gemm2.bytes / 1e9 == pytest.approx(3.37, abs=0.01)
    assert gemm1.fraction == pytest.approx(0.39, abs=0.01)
    assert gemm2.fraction == pytest.approx(0.17, abs=0.01)
    assert {"bf16", "w8a16", "w8a8"} <= {prediction.path for prediction in view.predictions}
    by_path = {prediction.path: prediction for prediction in view.predictions}
    assert by_path["bf16"].ns > by_path["w8a16"].ns  # twice the bytes
    assert all(p.saved == pytest.approx(view.ns - p.ns) for p in view.predictions)


def test_a_cut_or_plain_copy(mi300x: Profile, classifier: Classifier, tmp_path: Path) -> None:
    from epfuse.errors import TraceError

    plain = tmp_path / "plain.json"
    with gzip.open(MI300X) as source, plain.open("wb") as target:
        shutil.copyfileobj(source, target)
    (again,) = profile_trace(read_trace(plain), classifier, shape=SHAPES["gpt-oss-20b"])
    assert again.to_json() | {"trace": ""} == mi300x.to_json() | {"trace": ""}
    for name, data in (("cut.json", plain.read_bytes()[:-5000]), ("cut.json.gz", MI300X.read_bytes()[:-500])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(TraceError, match=name):
            read_trace(tmp_path / name)


H100 = {name: DATA / f"h100-{name}-experts.trace.json.gz" for name in ("epfuse", "transformers")}
"""What tools/record_profiles.py has recorded; its model has one dense layer and three MoE layers."""

MOE_LAYERS = 3


def h100(name: str, classifier: Classifier) -> Profile:
    (profile,) = profile_trace(read_trace(H100[name]), classifier)
    return profile


def calls_of(profile: Profile, word: str, phase: Phase) -> int:
    """Calls of the kernels with ``word`` in their name, all of which must be in that phase."""
    found = {p.phase: sum(k.calls for k in p.kernels if word in k.name) for p in profile.phases}
    assert {p for p, calls in found.items() if calls} == {phase}
    return found[phase]


@pytest.mark.parametrize("name", H100)
def test_all_of_an_h100s_kernels_are_counted(name: str, classifier: Classifier) -> None:
    with gzip.open(H100[name]) as file:
        events = json.load(file)["traceEvents"]
    durations = [event["dur"] for event in events if event.get("cat") == "kernel"]
    profile = h100(name, classifier)
    assert profile.kernels_total == profile.kernels_in_trace == len(durations)
    assert sum(phase.calls for phase in profile.phases) == len(durations)
    assert profile.unclassified == []
    assert sum(phase.ns for phase in profile.phases) == profile.time.kernel_sum
    assert profile.time.kernel_sum / 1000 == pytest.approx(sum(durations), abs=0.0005 * len(durations))
    assert profile.time.busy <= profile.time.kernel_sum + profile.time.copies_ns <= profile.time.span
    assert (profile.product, profile.device.capability) == ("H100 SXM", (9, 0))
    assert (len(profile.layers), profile.layers_found_by) == (MOE_LAYERS + 1, "modules")


@pytest.mark.parametrize("name", H100)
def test_an_h100s_trace_tells_nothing_of_its_host(name: str) -> None:
    texts: list[str] = []
    trace = json.loads(
        gzip.decompress(H100[name].read_bytes()),
        object_hook=lambda item: texts.extend(v for v in item.values() if isinstance(v, str)) or item,
    )
    assert not {"host_name", "traceName", "trace_id", "distributedInfo"} & set(trace)
    assert len(texts) > 1000
    assert [text for text in texts if re.search(r"[/\\]|\.(py|so)\b", text)] == []


def test_our_experts_on_an_h100(classifier: Classifier) -> None:
    profile = h100("epfuse", classifier)
    ours = {
        "route_kernel": Phase.PREPARE,
        "gate_up_sm90_kernel": Phase.GEMM1,
        "down_sm90_kernel": Phase.GEMM2,
        "combine_kernel": Phase.COMBINE,
    }
    assert {name: calls_of(profile, name, phase) for name, phase in ours.items()} == dict.fromkeys(ours, MOE_LAYERS)
    for phase in (Phase.PREPARE, Phase.GEMM1, Phase.GEMM2):
        assert phase_of(profile, phase).calls == MOE_LAYERS
    # behind the stage's kernel: times the scaling factor, plus the shared expert
    assert phase_of(profile, Phase.COMBINE).calls == 3 * MOE_LAYERS
    for stage, phase in (("route", Phase.PREPARE), ("gate_up", Phase.GEMM1), ("down", Phase.GEMM2)):
        assert profile.ranges[f"epfuse::{stage}"] == (MOE_LAYERS, phase_of(profile, phase).ns)
    assert profile.ranges["epfuse::combine"][0] == MOE_LAYERS


def test_transformers_eager_experts_on_an_h100(classifier: Classifier) -> None:
    profile = h100("transformers", classifier)
    experts = 84  # that have a row, of the three layers
    assert [phase_of(profile, phase).calls for phase in (Phase.GEMM1, Phase.GEMM2)] == [experts, experts]
    assert phase_of(profile, Phase.ACTIVATION).calls == 7 * experts
    # the routing weights gathered, multiplied and cast, the rows added; then times the scaling factor, plus the shared
    assert phase_of(profile, Phase.COMBINE).calls == 4 * experts + 2 * MOE_LAYERS
    assert calls_of(profile, "indexFuncSmallIndex", Phase.COMBINE) == experts
    assert calls_of(profile, "write_indices", Phase.PREPARE) == experts  # where its rows are


def test_only_the_experts_differ_between_the_h100s_steps(classifier: Classifier) -> None:
    steps = [h100(name, classifier) for name in H100]
    moe = {Phase.PREPARE, Phase.GEMM1, Phase.ACTIVATION, Phase.GEMM2, Phase.COMBINE}
    ours, theirs = ({p.phase: p.calls for p in step.phases if p.phase not in moe} for step in steps)
    assert ours == theirs
    assert Phase.ROUTER in ours
    assert ours[Phase.SHARED_EXPERT] == MOE_LAYERS * ours[Phase.DENSE_FFN]
