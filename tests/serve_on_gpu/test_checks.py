"""The checks of answers of tools.serve_on_gpu, with servers that are stubs: each fails where it should."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tools.serve_on_gpu import answers, checkpoint, endure, memory, sleep, trace
from tools.serve_on_gpu.arms import ServerArm, Workplace
from tools.serve_on_gpu.parts import Folder, Outcome, TimeBudget
from tools.serve_on_gpu.records import merge

from epfuse.errors import ConfigError
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.serving.gate import Reading
from epfuse.serving.node import GpuSample
from tests.integrations.vllm_e2e.checkpoint import RECITING, build, checkpoint_tensors


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Workplace:
    made = Workplace(tmp_path / "work", str(model))
    made.prepare()
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "out", "a")


def records(folder: Folder) -> list[dict]:
    return merge([folder.path])


def stub_reading() -> Reading:
    """What the stub says of the texts."""

    def logprob(text: str, place: int) -> float:
        return -hashlib.sha256(text[:place].encode()).digest()[0] / 64

    return Reading(
        tuple(tuple(logprob(text, place) for place in range(1, len(text))) for text in answers.TEXTS),
        tuple(() for _ in answers.TEXTS),
    )


@pytest.mark.parametrize(("ours", "passed"), [("", True), ("rare=1.5", False)])
def test_log_probabilities(place, folder, monkeypatch, ours, passed) -> None:
    monkeypatch.setenv("STUB_OURS", ours)
    found = answers.logprobs({"mxfp8": place}, stub_reading, folder, TimeBudget(500), {})
    (record,) = records(folder)
    assert (record["complete"], record["passed"], not found.failed) == (True, passed, passed)
    assert record["mean_error"]["none"] == 0
    assert "3" in record["reason"]


def test_a_format_alone_has_its_own_record(place, folder) -> None:
    answers.logprobs({"bf16": place}, stub_reading, folder, TimeBudget(500), {})
    answers.logprobs({"mxfp8": place}, stub_reading, folder, TimeBudget(500), {})
    assert [record["model"][-5:].strip() for record in records(folder)] == ["mxfp8", "bf16"]


def test_a_long_run_ends_in_time(place, folder, monkeypatch) -> None:
    """As many requests as there is time for, and the checks that follow them."""
    monkeypatch.setattr(endure, "START_SECONDS", -60.0)
    monkeypatch.setattr(endure, "STOP", 1.0)
    monkeypatch.setattr(endure, "PROBE_SECONDS", 2.0)
    monkeypatch.setattr(endure, "_send", lambda running, numbers, tally: time.sleep(1.0))
    found = endure.run(place, 50, folder, TimeBudget(9), {})
    (record,) = records(folder)
    assert not found.left
    assert 1 <= len(record["memory"]) < 10
    assert "only 0 of 50 requests" in record["reason"]


def test_errors_are_compared_by_their_scatter() -> None:
    own = [0.01 * (number % 7) for number in range(700)]
    assert answers.compare(list(reversed(own)), own)["passed"]
    worse = answers.compare([error + 0.005 for error in own], own)
    assert not worse["passed"]
    assert worse["difference"] == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("faults", "words"), [("", "every sentence"), ("shifted=0", "every"), ("silent", "can be read")]
)
def test_recital(place, folder, monkeypatch, faults, words) -> None:
    monkeypatch.setenv("STUB_FAULTS", faults)
    found = answers.recite(place, {"abc": "def", "abcd": "ef"}, folder, TimeBudget(500), {})
    assert (not found.failed) == (faults != "silent"), found
    record = records(folder)[0]
    assert words in record.get("reason", record.get("error"))
    other = answers.recite(place, {"abc": "xyz"}, Folder(folder.path, "b"), TimeBudget(500), {})
    assert other.failed


@pytest.mark.parametrize(
    ("faults", "late", "words"),
    [
        ("", "", ""),
        ("drifts", "", "answers changed"),
        ("calm", "", "nothing was preempted"),
        ("", "1000", "kernels were compiled or loaded"),
        ("leaks", "", "tensors on the GPU grew"),
        ("leaks falls-silent", "", "a process did not say what its tensors take"),
        ("secretive", "", "a process did not say what its tensors take"),
    ],
)
def test_a_long_run(place, folder, monkeypatch, faults, late, words) -> None:
    monkeypatch.setenv("STUB_FAULTS", faults)
    monkeypatch.setattr(endure, "SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(memory, "STALE", 1.0)
    if late:
        monkeypatch.setenv("STUB_LATE", late)
    monkeypatch.setattr(endure, "BROKEN", 0.2)
    found = endure.run(place, 50, folder, TimeBudget(500), {})
    (record,) = records(folder)
    assert (record["answered"] + record["broken_off"], record["preempted"]) == (50, 0 if words[:3] == "not" else 3)
    assert record["broken_off"] > 0
    assert record["passed"] == (not words)
    assert words in record["reason"]
    assert bool(found.failed) == bool(words)
    if faults not in ("secretive", "leaks falls-silent"):  # two processes
        assert record["memory"][-1]["most_allocated"] == 1000.0
        assert record["torch_memory"][-1]["reserved"] > record["torch_memory"][0]["reserved"] >= 1200.0


def test_a_long_run_without_epfuse(place, folder, monkeypatch) -> None:
    monkeypatch.setattr(endure, "SETTLE_SECONDS", 0.3)
    found = endure.run(place, 50, folder, TimeBudget(500), {}, ServerArm.NONE)
    assert not found.failed
    (record,) = records(folder)
    assert record["arm"] == "none"
    assert record["passed"]
    assert not endure.run(place, 50, folder, TimeBudget(500), {}, ServerArm.NONE).left  # it is done
    assert len(records(folder)) == 1


def test_what_torch_holds_is_read_back(tmp_path) -> None:
    stats = {"allocated_bytes.all.current": 3 << 20, "allocated_bytes.all.peak": 9 << 20}
    one = memory.of_stats([stats, {}, {**stats, "reserved_bytes.all.current": 16 << 20}])
    assert one == memory.TorchMemory(6.0, 18.0, 16.0)
    for process, times in enumerate([(10.0, 12.0), (11.0,)]):
        lines = [json.dumps({"time": moment, **dataclasses.asdict(one)}) for moment in times]
        (tmp_path / f"memory-{process}.jsonl").write_text("\n".join(lines) + '\n{"time": 13')
    samples = memory.read_samples(tmp_path)
    assert memory.at(samples, 10.5) is None  # the other process has said nothing yet
    assert memory.at(samples, 11.5) == memory.TorchMemory(12.0, 36.0, 32.0)
    assert memory.at([], 11.5) is None
    assert memory.at(samples, 12.0 + memory.STALE) is None  # nobody knows what the second has taken since
    (tmp_path / "memory-1.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="no sample of memory"):
        memory.read_samples(tmp_path)


def test_a_process_samples_once_and_where_it_uses_a_gpu(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: (tmp_path / "now").exists())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda gpu: {"reserved_bytes.all.current": gpu << 20})
    monkeypatch.setattr(memory, "_sampled", set())
    for _ in range(3):
        memory.sample_into(tmp_path, 0.01)
    assert sum(thread.name == "memory" for thread in threading.enumerate()) == 1
    time.sleep(0.1)
    assert not memory.read_samples(tmp_path)
    (tmp_path / "now").touch()
    deadline = time.monotonic() + 10
    while not memory.read_samples(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert memory.at(memory.read_samples(tmp_path), time.time()) == memory.TorchMemory(0.0, 0.0, 1.0)


def test_memory_of_other_gpus_is_others_business(monkeypatch) -> None:
    samples = [GpuSample(0, memory=100.0), GpuSample(1, memory=7.0), GpuSample(2)]
    monkeypatch.setattr(endure, "Gpus", lambda vendor: SimpleNamespace(sample=lambda: samples))
    found = []
    for visible in ("", "1", "0,1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found.append(endure.used_on_gpus())
    assert found == [107.0, 7.0, 107.0]


def test_memory_that_grows() -> None:
    samples = [{"allocated": 100.0, "host_mib": 5.0}, {"allocated": 150.0, "host_mib": 900.0}]
    assert [endure.grew(samples, "allocated", 64.0), endure.grew(samples, "host_mib", 512.0)] == [False, True]
    assert endure.grew([{"allocated": 100.0}, {"allocated": 200.0}], "allocated", endure.GPU_MIB)  # a leak of 100 MiB
    assert not endure.grew([{"host_mib": 5.0}] * 2, "allocated", 64.0)


@pytest.mark.parametrize(
    ("fault", "passed", "words"),
    [
        ("", [True, True, True], "the same answers"),
        ("refuses", [True, True, True], "the weights of layer 1 were replaced"),
        ("forgets", [True, False, False], "OTHER ANSWERS"),
    ],
)
def test_sleep_and_weights_in_place(place, folder, monkeypatch, fault, passed, words) -> None:
    monkeypatch.setenv("STUB_FAULTS", fault)
    found = sleep.run(place, folder, TimeBudget(500), {})
    assert [record["passed"] for record in records(folder)] == passed
    assert words in records(folder)[2]["reason"]
    assert len(found.failed) == passed.count(False)


@pytest.mark.parametrize(("fault", "words"), [("", ""), ("traceless", "left no trace")])
def test_traces(place, folder, monkeypatch, fault, words) -> None:
    monkeypatch.setenv("STUB_FAULTS", fault)
    monkeypatch.setattr(trace, "SETTLE", 0.01)
    stale = place.path / "traces" / "a-none" / "stale.json.gz"
    stale.parent.mkdir(parents=True)
    stale.touch()
    found = trace.run(place, trace.Wanted(2, answer=8), folder, TimeBudget(500), {})
    assert [record.get("traces") for record in records(folder)] == (
        [None] * 2 if words else [["rank0.pt.trace.json.gz"]] * 2
    )
    assert all(words in line for line in found.failed)
    assert bool(found.failed) == bool(words)


def test_what_there_is_no_time_for(place, folder) -> None:
    parts = [
        answers.logprobs({"mxfp8": place}, stub_reading, folder, TimeBudget(5), {}),
        answers.recite(place, {"a": "b"}, folder, TimeBudget(5), {}),
        endure.run(place, 50, folder, TimeBudget(5), {}),
        sleep.run(place, folder, TimeBudget(5), {}),
        trace.run(place, trace.Wanted(2), folder, TimeBudget(5), {}),
    ]
    assert [(len(part.failed), len(part.left)) for part in parts] == [(0, 1)] * 5
    assert not list(folder.path.iterdir())


@pytest.mark.parametrize(("failed", "left", "code"), [([], [], 0), ([], ["x"], 75), (["x"], ["y"], 1)])
def test_exit_codes(failed, left, code) -> None:
    with pytest.raises(SystemExit) as ended:
        Outcome(failed, left).finish()
    assert ended.value.code == code


def test_a_plugin_that_leaves_the_layers_is_no_arm_of_ours(place, folder, monkeypatch) -> None:
    monkeypatch.setattr(answers, "what_the_log_says", lambda log, arm: {"fits": True, "runs": False, "said": []})
    assert "does not fit" in answers.recite(place, {"abc": "def"}, folder, TimeBudget(500), {}).failed[0]
    assert ServerArm.EPFUSE == "epfuse"


def test_both_formats_of_a_checkpoint_hold_the_same_numbers() -> None:
    kind = dataclasses.replace(RECITING, recites=False)
    model = build(kind)
    mxfp8, bf16 = checkpoint_tensors(model, kind), checkpoint_tensors(model, kind, mxfp8=False)
    name = "model.layers.1.block_sparse_moe.experts.3.w2"
    packed = MXFP8(mxfp8[f"{name}.weight"], mxfp8[f"{name}.weight_scale_inv"])
    assert torch.equal(packed.dequantize(torch.float32), bf16[f"{name}.weight"].float())
    assert f"{name}.weight_scale_inv" not in bf16
    said = checkpoint.read(model, ("Experts wait.",))
    assert len(said.logprobs[0]) == len("Experts wait.")
    assert max(said.logprobs[0]) < 0
