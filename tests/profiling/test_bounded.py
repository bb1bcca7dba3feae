"""Hostile sizes: what would take memory or time without end is read in a straight line, or refused by name."""

from __future__ import annotations

import gzip
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from epfuse.cli.main import main
from epfuse.errors import ConfigError, TraceError
from epfuse.profiling import classify, json_stream, read_trace
from epfuse.profiling.classify import Classifier
from epfuse.profiling.events import Range
from epfuse.profiling.profile import profile_trace
from epfuse.profiling.ranges import MOST_OPEN, enclosing
from epfuse.profiling.rules import RuleSet
from tests.profiling.traces import NORM, TraceFile

HEAD = "schema: 1\nname: x\n"
SHORT = 30.0
"""CPU seconds that a test with a straight line may take on a slow machine; squares took minutes."""


def profiled(trace: TraceFile, folder: Path, classifier: Classifier) -> float:
    """CPU seconds to read and profile it."""
    path = trace.write(folder / "trace.json")
    began = time.process_time()
    profile_trace(read_trace.read_trace(path), classifier)
    return time.process_time() - began


def stepped(trace: TraceFile, steps: int, label: str, duration: float) -> TraceFile:
    for index in range(steps):
        trace.range(label, index, duration)
        trace.kernel("gate_up_kernel", index + 2 * steps, 0.5, correlation=trace.launch(index + 0.25, 0.1))
    return trace


@pytest.mark.parametrize("label", ["execute_context_0(0)_generation_1(1)", "nn.Module: DecoderLayer_1"])
def test_ranges_that_all_overlap_are_refused(classifier: Classifier, tmp_path: Path, label: str) -> None:
    with pytest.raises(
        TraceError, match=rf"trace.json can't be profiled: more than {MOST_OPEN} ranges are open at once"
    ):
        profiled(stepped(TraceFile(), 2000, label, 1e6), tmp_path, classifier)


def test_many_steps(classifier: Classifier, tmp_path: Path) -> None:
    assert profiled(stepped(TraceFile(), 5_000, "step[DECODE bs=4]", 0.9), tmp_path, classifier) < SHORT


def test_a_range_that_ended_inside_another_encloses_nothing() -> None:
    a, b = Range("a", 1, 0, 10), Range("b", 1, 5, 20)
    got = enclosing([b, a], [(1, moment, moment) for moment in (2, 7, 15, 30)])
    assert got == {2: (a,), 7: (a, b), 15: (b,)}


def test_many_devices_and_processes(classifier: Classifier, tmp_path: Path) -> None:
    trace = TraceFile()
    for index in range(2000):
        trace.kernel("k", index, 1, device=index)
    with pytest.raises(TraceError, match="has kernels of 2000 devices; it may have 1024"):
        profiled(trace, tmp_path, classifier)
    trace = TraceFile()
    call = {"ph": "X", "cat": "cuda_runtime", "name": "l", "tid": 1, "dur": 1, "args": {"correlation": 7}}
    for index in range(3000):
        trace.events.append(call | {"pid": 1000 + index, "ts": index})
        trace.kernel("k", index + 20_000, 1, correlation=7)
    assert profiled(trace, tmp_path, classifier) < SHORT


def test_one_layer_of_thousands_of_kernels(classifier: Classifier, tmp_path: Path) -> None:
    trace = TraceFile()
    for index in range(6000):
        trace.kernel((NORM, f"silu_{index}", f"gemm_{index}")[index % 3] if index % 3000 else "turn", index, 0.5)
    assert profiled(trace, tmp_path, classifier) < SHORT


def test_more_than_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = stepped(TraceFile(), 40, "step[DECODE bs=4]", 0.9)
    path = trace.write(tmp_path / "trace.json")
    monkeypatch.setattr(read_trace, "MOST_EVENTS", 100)
    with pytest.raises(TraceError, match="more than 100 kernels, launching calls and ranges; record fewer steps"):
        read_trace.read_trace(path)
    monkeypatch.setattr(read_trace, "MOST_EVENTS", 1000)
    monkeypatch.setattr(read_trace, "MOST_NAMES", 20)
    with pytest.raises(TraceError, match="names of the trace to more than 20 characters"):
        read_trace.read_trace(path)


def events(count: int) -> bytes:
    return b'{"traceEvents": [{}' + b",{}" * count + b"]}"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (events(2_000_000), "bytes unpack to .*: that is no trace"),
        (b'{"traceEvents": [' + b" " * 3_000_000 + b"]}", "characters of white space|bytes unpack to"),
        (b'{"traceEvents": [{"name": "' + b"a" * 8_000_000 + b'"}]}', "bytes unpack to|is longer than"),
    ],
    ids=["events", "blanks", "text"],
)
def test_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, words: str) -> None:
    for name, value in (
        ("MOST_UNPACKED", 1 << 20),
        ("MOST_BLANKS", 1 << 20),
        ("LARGEST_VALUE", 1 << 20),
        ("CHUNK", 1 << 18),
    ):
        monkeypatch.setattr(json_stream, name, value)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(data))
    with pytest.raises(TraceError, match=words):
        read_trace.read_trace(path)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_what_is_no_file_is_refused_at_once(tmp_path: Path, fifo: Path) -> None:
    good = TraceFile()
    good.kernel("gate_up_kernel", 0, 5)
    path = good.write(tmp_path / "good.json")
    for odd in (fifo, Path("/dev/zero"), Path("/dev/null"), tmp_path):
        for arguments in ([odd], ["--compare", path, odd], ["--compare", odd, path]):
            result = CliRunner().invoke(main, ["profile", *map(str, arguments)])
            assert result.exit_code == 2, result.output
            assert "can't be read" in result.stderr
            assert result.stdout == ""
    for option in ("--map", "--config"):
        result = CliRunner().invoke(main, ["profile", str(path), option, "/dev/zero"])
        assert (result.exit_code, result.stdout) == (2, "")
        assert "has more than" in result.stderr


def laughs(first: str, step: str) -> str:
    lines = [f"  a0: &a0 {first}"]
    lines += [f"  a{i}: &a{i} " + step.format(", ".join([f"*a{i - 1}"] * 9)) for i in range(1, 12)]
    return HEAD + "patterns:\n" + "\n".join(lines) + "\nrules: []\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (laughs("{k: v}", "{{<<: [{}]}}"), "line 9, column 17: a5|with its aliases it has more than 20000 values"),
        (laughs("[v]", "[{}]"), "with its aliases it has more than 20000 values"),
        (HEAD + "patterns: &p {a: *p}\nrules: []", "a value contains itself"),
        (HEAD + "patterns: {a: 1" + ":1" * 50_000 + "}\nrules: []", "a number has more than 40 digits"),
        (HEAD + "rules: [{phase: router, kernel: a, phase: combine}]", "the key 'phase' stands twice"),
        (HEAD + "rules:\n- {phase: router, kernel: a}\n- phase: router\n  kernel: '('\n", "line 6: rules.1.kernel: "),
        (HEAD + "rules: [" + ",".join(["{phase: router, kernel: x}"] * 501) + "]", "at most 500 items"),
        (HEAD + f"rules: [{{phase: router, kernel: {'x' * 2001}}}]", "may have 2000 characters, and not 2001"),
        (HEAD + "? [a]\n: 1\nrules: []", "is not YAML"),
        (HEAD + "patterns: {a: 2001-99-99}\nrules: []", "is not YAML"),
        (HEAD + 'rules: []\n"\\e[31m": 1', "line 4: \ufffd[31m: Extra"),
    ],
)
def test_hostile_rules(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words.replace("[31m", r"\[31m")) as error:
        RuleSet.load(path)
    assert str(error.value).startswith(f"rules {path}")
    assert "\x1b" not in str(error.value)


def test_a_pattern_that_takes_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classify, "MATCHING_SECONDS", 0.3)
    trace = TraceFile()
    trace.kernel("a" * 60 + "!", 0, 5)
    path = trace.write(tmp_path / "trace.json")
    rules = tmp_path / "slow.yaml"
    rules.write_text(HEAD + "rules:\n- {phase: router, kernel: '^(a+)+$'}\n")
    result = CliRunner().invoke(main, ["profile", str(path), "--map", str(rules)])
    assert result.exit_code == 2
    assert "'^(a+)+$' of rules x: rules.0.kernel, takes more than 0.3 seconds of CPU time" in result.stderr


def test_many_short_searches_spend_it_too(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classify, "MATCHING_SECONDS", 0.2)
    trace = TraceFile()
    for index in range(5000):
        trace.kernel(f"n{index}" + "x" * 200, index, 1)
    with pytest.raises(ConfigError, match=r"matching names, at last with .* takes more than 0.2 seconds"):
        profiled(trace, tmp_path, Classifier(classifier.rules))


def test_a_pattern_of_a_range_that_takes_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classify, "MATCHING_SECONDS", 0.3)
    rules = tmp_path / "slow.yaml"
    rules.write_text(HEAD + "rules:\n- {phase: router, range: '^(a|a)*$'}\n")
    trace = stepped(TraceFile(), 2, "a" * 60 + "!", 0.9)
    with pytest.raises(ConfigError, match=r"rules.0.range, takes more than"):
        profile_trace(read_trace.read_trace(trace.write(tmp_path / "t.json")), Classifier(RuleSet.load(rules)))
