"""Traces of real runs: an MI300X server, and a small model on an H100 (tests/data/README.md)."""

from __future__ import annotations

import gzip
import json
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
    assert time.span - time.busy == time.streams[0].gaps.device == 25_474
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


def _recorded(name: str, classifier: Classifier) -> Profile:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path.name} is not recorded yet: tools/record_profiles.py on a GPU, see docs/profiling.md")
    (profile,) = profile_trace(read_trace(path), classifier)
    return profile


EXPERTS_MODULES = 3  # MoE layers of tools/record_profiles.py's model; it has one dense layer


def test_our_experts_on_an_h100(classifier: Classifier) -> None:
    profile = _recorded("h100-epfuse-experts.trace.json.gz", classifier)
    assert profile.product == "H100 SXM"
    assert len(profile.layers) == EXPERTS_MODULES + 1
    for phase, name in ((Phase.GEMM1, "gate_up_"), (Phase.GEMM2, "down_"), (Phase.COMBINE, "combine_")):
        ours = [kernel for kernel in phase_of(profile, phase).kernels if kernel.name.startswith(name)]
        assert sum(kernel.calls for kernel in ours) == EXPERTS_MODULES
    assert {"epfuse::route", "epfuse::gate_up", "epfuse::down", "epfuse::combine"} <= set(profile.ranges)
    assert profile.coverage > 0.95


def test_transformers_eager_experts_on_an_h100(classifier: Classifier) -> None:
    profile = _recorded("h100-transformers-experts.trace.json.gz", classifier)
    assert profile.product == "H100 SXM"
    assert (len(profile.layers), profile.layers_found_by) == (EXPERTS_MODULES + 1, "modules")
    first, second = phase_of(profile, Phase.GEMM1), phase_of(profile, Phase.GEMM2)
    assert first.calls == second.calls  # one pair for each expert that has a token
    assert first.calls >= 4 * EXPERTS_MODULES
    present = {phase.phase for phase in profile.phases}
    assert {Phase.ROUTER, Phase.PREPARE, Phase.ACTIVATION, Phase.COMBINE, Phase.SHARED_EXPERT} <= present
    assert profile.coverage > 0.95
