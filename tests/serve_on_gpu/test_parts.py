"""tools.serve_on_gpu with servers that are stubs: what is measured, kept, resumed and left out."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tools.serve_on_gpu import __main__ as tool
from tools.serve_on_gpu import alternate, answers, arms, metrics, servers
from tools.serve_on_gpu.arms import ServerArm
from tools.serve_on_gpu.parts import OutOfTime
from tools.serve_on_gpu.records import merge
from tools.serve_on_gpu.servers import parse_loads, parse_servers
from tools.serve_on_gpu.tables import rows_of

from epfuse.errors import ConfigError

POINTS = ["--new", "8/3@2", "--warm", "8/3@1,2", "--waves", "1"]


def call(tmp_path: Path, model: Path, part: str, *arguments: str) -> Result:
    common = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--model", str(model)]
    return CliRunner().invoke(tool.main, [part, *common, *arguments])


def by_number(tmp_path: Path, part: str) -> dict[int, dict]:
    return {record["number"]: record for record in merge([tmp_path / "out"]) if record["part"] == part}


def test_servers_in_turn(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    done = call(tmp_path, model, "serve", "--servers", "none,epfuse,epfuse,none,epfuse:cold", *POINTS)
    assert done.exit_code == 0, done.output
    found = by_number(tmp_path, "serve")
    assert [found[number]["arm"] for number in range(1, 6)] == ["none", "epfuse", "epfuse", "none", "epfuse"]
    assert [found[number]["cold"] for number in range(1, 6)] == [True, True, False, False, True]
    for record in found.values():
        assert record["complete"]
        assert len(record["first"]["each"]) == servers.FIRST
        assert [(one["concurrency"], one["new"], one["completed"]) for one in record["points"]] == [
            (2, True, 4),
            (1, False, 4),
            (2, False, 4),
        ]
    ours = found[3]
    assert (ours["runs"], ours["gpus"]) == (True, ["NVIDIA H200"])
    assert ours["compiles"] == {"ours before": {"compiled": 0, "loaded": 1}}
    assert found[5]["compiles"] == {"ours before": {"compiled": 1, "loaded": 0}}
    assert not found[4]["said"]
    merged = CliRunner().invoke(tool.main, ["merge", str(tmp_path / "out"), "--json", str(tmp_path / "record.json")])
    assert (
        "none against epfuse: 192 of 192 tokens equal; log probabilities on the same prefix at most 0.0000"
        in merged.output
    )
    rows = {row["what"].split(": ")[1]: row for row in json.loads((tmp_path / "record.json").read_text())["rows"]}
    assert len(rows["first requests, caches empty, s"]["epfuse"]) == 2
    assert rows["kernels of epfuse compiled or loaded after ready"]["reached"] is True


def test_a_server_that_counts_no_preemptions_is_not_said_to_have_none(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = metrics.read
    answered = iter([True, True, True, False])  # before and after each server's point
    monkeypatch.setattr(metrics, "read", lambda port: read(port) if next(answered) else "")
    done = call(tmp_path, model, "alternate", "--points", "8/3@1", "--rounds", "1", "--waves", "1")
    assert done.exit_code == 0, done.output
    found = {record["arm"]: record for record in merge([tmp_path / "out"]) if record["part"] == "alternate"}
    assert [found[arm]["points"][0].get("preempted") for arm in ("none", "epfuse")] == [0, None]


def test_servers_side_by_side_take_turns(tmp_path: Path, model: Path) -> None:
    done = call(tmp_path, model, "alternate", "--points", "8/3@1,2", "--rounds", "2", "--waves", "1")
    assert done.exit_code == 0, done.output
    turns = [line.split()[1:4] for line in done.output.splitlines() if "TPOT" in line]
    order = ["none", "epfuse", "epfuse", "none"]
    assert turns == [[arm, "8/3", f"c{c}:"] for c in (1, 2) for arm in order]
    found = {record["arm"]: record for record in merge([tmp_path / "out"]) if record["part"] == "alternate"}
    for record in found.values():
        assert record["complete"]
        seen = [(point["concurrency"], point["round"], point["completed"]) for point in record["points"]]
        assert seen == [(1, 0, 4), (1, 1, 4), (2, 0, 4), (2, 1, 4)]
        assert [point["preempted"] for point in record["points"]] == [0] * 4
    assert (found["none"]["runs"], found["epfuse"]["runs"]) == (False, True)
    (row,) = [row for row in rows_of(list(found.values())) if row.what.endswith("in turn: TPOT, 8/3 c2, ms")]
    assert (len(row.none), len(row.epfuse)) == (2, 2)
    again = call(tmp_path, model, "alternate", "--points", "8/3@1,2")
    assert (again.exit_code, again.output) == (0, "")


def test_rounds_that_were_done_when_the_time_was_over_are_in_the_table(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fourth turn is the second one's of the second round."""
    turns = iter(range(10))

    def measured(server: object, bench: object, load: servers.Load, number: int) -> dict:
        if next(turns) == 3:
            raise OutOfTime("the time of this part is over")
        about = {"isl": load.isl, "osl": load.osl, "concurrency": load.concurrency, "new": False, "round": number}
        return about | {"median_tpot_ms": 1.0 + number}

    monkeypatch.setattr(alternate, "_measured", measured)
    done = call(tmp_path, model, "alternate", "--points", "8/3@1", "--rounds", "3", "--waves", "1")
    assert done.exit_code == 75, done.output
    found = merge([tmp_path / "out"])
    assert [record["complete"] for record in found] == [False, False]
    (row,) = [row for row in rows_of(found) if "TPOT" in row.what]
    assert (row.none, row.epfuse) == ((1.0,), (1.0,))
    assert not rows_of([record | {"error": "the server died"} for record in found])


def test_of_servers_side_by_side_none_stays_when_one_does_not_start(tmp_path, model, monkeypatch) -> None:
    monkeypatch.setenv("STUB_OURS", "dies")
    done = call(tmp_path, model, "alternate", "--points", "8/3@1", "--rounds", "1", "--waves", "1")
    assert done.exit_code == 1
    assert "the server died" in done.output
    records = [record for record in merge([tmp_path / "out"]) if record["part"] == "alternate"]
    assert [(record["arm"], record["complete"]) for record in records] == [("epfuse", False), ("none", False)]
    assert all("the server died" in record["error"] for record in records)
    mark = str(tmp_path).encode()
    left = [pid for pid in os.listdir("/proc") if pid.isdigit() and pid != str(os.getpid()) and _runs_in(pid, mark)]
    assert not left


@pytest.mark.parametrize("dying", ["none", "epfuse"])
def test_of_servers_side_by_side_one_is_not_waited_for_when_the_other_has_died(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, dying: str
) -> None:
    monkeypatch.setenv("STUB_OURS", "dies" if dying == "epfuse" else "unready")
    monkeypatch.setenv("STUB_OTHERS", "dies" if dying == "none" else "unready")
    begun = time.monotonic()
    done = call(tmp_path, model, "alternate", "--points", "8/3@1", "--rounds", "1", "--waves", "1")
    assert done.exit_code == 1
    assert "the server died" in done.output
    assert time.monotonic() - begun < answers.READY / 2


def test_of_servers_side_by_side_none_stays_after_an_interrupt(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While they start; it comes to this process alone, as Ctrl-C does."""
    monkeypatch.setenv("STUB_FAULTS", "unready")
    monkeypatch.setattr(answers, "READY", 20.0)
    threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    begun = time.monotonic()
    done = call(tmp_path, model, "alternate", "--points", "8/3@1", "--rounds", "1", "--waves", "1")
    assert isinstance(done.exception, SystemExit | KeyboardInterrupt), done.output
    assert "not ready" not in done.output
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and _is_stub(pid, tmp_path)]
    assert time.monotonic() - begun < 10


def _runs_in(pid: str, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_kernel_that_is_compiled_after_ready_is_counted(tmp_path, model, monkeypatch) -> None:
    monkeypatch.setenv("STUB_LATE", "1000")
    done = call(tmp_path, model, "serve", "--servers", "none,epfuse", "--new", "", "--warm", "")
    assert done.exit_code == 0, done.output
    assert by_number(tmp_path, "serve")[2]["compiles"]["ours after"] == {"compiled": 1, "loaded": 0}
    merged = CliRunner().invoke(tool.main, ["merge", str(tmp_path / "out")])
    assert merged.exit_code == 1
    assert "compiled or loaded after ready | - | 1 (n=1) |  | 0 | **no** |" in merged.output


def test_variables_reach_the_servers_and_stand_beside_the_model(tmp_path: Path, model: Path) -> None:
    done = call(tmp_path, model, "serve", "--servers", "epfuse", "--new", "", "--warm", "", "--set", "STUB_LATE=1000")
    assert done.exit_code == 0, done.output
    (record,) = by_number(tmp_path, "serve").values()
    assert record["compiles"]["ours after"] == {"compiled": 1, "loaded": 0}
    assert record["model"].split() == ["STUB_LATE=1000", str(model)]
    refused = call(tmp_path, model, "serve", "--set", "STUB_LATE")
    assert refused.exit_code == 2
    assert "--set is 'STUB_LATE'; it must be NAME=VALUE" in refused.output


@pytest.mark.parametrize(
    ("line", "own"),
    [
        ("(EngineCore pid=1) INFO 11-30 12:27:45 [mxfp8.py:139] Using 'HUMMING' MxFp8 MoE backend.", ["HUMMING"]),
        ("Using TRITON Fp8 MoE backend out of potential backends: ['MARLIN', 'TRITON']", ["TRITON"]),
        ("Using AttentionBackendEnum.TRITON_ATTN backend.", []),
    ],
)
def test_the_record_has_the_experts_that_vllm_chose(tmp_path: Path, line: str, own: list[str]) -> None:
    (tmp_path / "log").write_text(f"{line}\n")
    assert arms.what_the_log_says(tmp_path / "log", ServerArm.NONE)["own_experts"] == own


def test_how_long_requests_wait_in_the_engine_itself(tmp_path: Path, model: Path) -> None:
    done = call(tmp_path, model, "serve", "--servers", "none", "--new", "", "--warm", "9/3@2")
    assert done.exit_code == 0, done.output
    (point,) = by_number(tmp_path, "serve")[1]["points"]
    assert point["engine"] == {"request_queue_time_ms": 2000.0}


def test_metrics_of_all_engines_count_and_without_requests_there_is_no_mean() -> None:
    text = 'vllm:n_total{engine="0"} 3.0\nvllm:n_total{engine="1"} 4e+00\nvllm:n_total_more 9\n# vllm:n_total 1'
    assert (metrics.total(text, "n_total"), metrics.total(text, "m_total")) == (7.0, 0)
    assert metrics.means({"a": (1.0, 2.0), "b": (1.0, 2.0)}, {"a": (1.5, 2.0), "b": (1.5, 4.0)}) == {"b_ms": 250.0}


def test_a_point_that_no_server_takes_is_refused_before_one_starts(tmp_path: Path) -> None:
    done = call(tmp_path, "minimax-m3", "serve", "--servers", "none", "--new", "", "--warm", "4096/64@16")
    assert done.exit_code == 2
    assert "4096/64@16, 4160 tokens a request; the server takes 4096" in done.output
    longer = servers.check_lengths(
        servers.parse_loads("4096/64@16", False, 1), ("--max-model-len", "1", "--max-model-len", "9000")
    )
    assert longer is None


@pytest.mark.parametrize("said", [("--max-model-len", "auto"), ("--max-model-len", "8k"), ("--max-model-len=8192",)])
def test_a_length_that_only_the_server_can_judge_is_left_to_it(said: tuple[str, ...]) -> None:
    loads = servers.parse_loads("4096/64@16", False, 1)
    servers.check_lengths(loads, ("--max-model-len", "1", *said))
    with pytest.raises(ConfigError, match="the server takes 4000"):
        servers.check_lengths(loads, (*said, "--max-model-len=4000"))


def test_what_is_done_is_not_done_again(tmp_path: Path, model: Path) -> None:
    arguments = ("serve", "--servers", "none,epfuse", "--new", "", "--warm", "")
    late = call(tmp_path, model, *arguments, "--seconds", "150")  # enough for one without caches, by what is assumed
    assert late.exit_code == 0, late.output
    first = by_number(tmp_path, "serve")
    again = call(tmp_path, model, *arguments)
    assert again.exit_code == 0
    assert by_number(tmp_path, "serve") == first
    call(tmp_path, model, *arguments, "--label", "b")
    assert len(merge([tmp_path / "out"])) == 4


def test_nothing_is_begun_that_would_not_end_in_time(tmp_path: Path, model: Path) -> None:
    done = call(tmp_path, model, "serve", "--servers", "none,epfuse", *POINTS, "--seconds", "60")
    assert done.exit_code == 75
    assert "server 1 (none) and those after it: a server without caches takes some 140 s" in done.output
    assert not list((tmp_path / "out").iterdir())


def test_a_server_is_ended_when_the_time_is_over(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "COLD_SECONDS", 1.0)
    monkeypatch.setenv("STUB_FAULTS", "unready")
    done = call(tmp_path, model, "serve", "--servers", "none", *POINTS, "--seconds", "3")
    assert done.exit_code == 75, done.output
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and _is_stub(pid, tmp_path)]


def _is_stub(pid: str, tmp_path: Path) -> bool:
    try:
        return str(tmp_path).encode() in Path("/proc", pid, "environ").read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ("dies", "the server died"),
        ("dies_after=5", "the server died"),
        ("silent", "no answer that can be read"),
    ],
)
def test_a_server_that_fails_is_said_and_the_next_one_runs(tmp_path, model, monkeypatch, faults, words) -> None:
    monkeypatch.setenv("STUB_FAULTS", faults)
    done = call(tmp_path, model, "serve", "--servers", "none,none", *POINTS)
    assert done.exit_code == 1
    found = by_number(tmp_path, "serve")
    assert [words in found[number]["error"] for number in (1, 2)] == [True, True]
    assert CliRunner().invoke(tool.main, ["merge", str(tmp_path / "out")]).exit_code == 1


def test_an_arm_that_is_not_what_it_says(tmp_path, model, monkeypatch) -> None:
    monkeypatch.setattr(
        arms.Workplace, "task", lambda self, arm, *rest, **more: TASK(self, ServerArm.NONE, *rest, **more)
    )
    done = call(tmp_path, model, "serve", "--servers", "epfuse", "--new", "", "--warm", "")
    assert done.exit_code == 1
    assert "does not fit an arm epfuse" in done.output


TASK = arms.Workplace.task


def test_the_measuring_process_dies(tmp_path: Path, model: Path) -> None:
    done = call(tmp_path, model, "serve", "--servers", "none", "--new", "", "--warm", "99/3@1")
    assert done.exit_code == 1
    assert "process of vllm bench serve has ended: killed" in by_number(tmp_path, "serve")[1]["error"]


def test_offline_runs(tmp_path: Path, model: Path) -> None:
    done = call(tmp_path, model, "offline", "--runs", "epfuse:cold,none,none,epfuse")
    assert done.exit_code == 0, done.output
    found = by_number(tmp_path, "offline")
    assert [(found[n]["arm"], found[n]["run"], found[n]["cold"]) for n in (1, 2, 3, 4)] == [
        ("epfuse", 1, True),
        ("none", 1, True),
        ("none", 2, False),
        ("epfuse", 2, False),
    ]
    assert [found[n]["tokens_per_second"] for n in (1, 4)] == [60_000, 120_000]
    assert found[4]["compiles"] == {"ours after": {"compiled": 0, "loaded": 1}}
    rows = {row.what.split(", ")[1]: (row.none, row.epfuse) for row in rows_of(list(found.values()))}
    assert rows == {"caches empty": ((80_000,), (60_000,)), "caches filled": ((80_000,), (120_000,))}


@pytest.mark.parametrize("text", ["none,", "epfuse:warm", "marlin"])
def test_servers_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="a server is"):
        parse_servers(text)


@pytest.mark.parametrize("text", ["128@1", "128/256", "128/256@0", "0/1@1", "1/1@1,"])
def test_points_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="point"):
        parse_loads(text, False, 3)


@pytest.mark.parametrize(("shared", "more"), [(True, ("--enable-expert-parallel",)), (False, ())])
def test_several_gpus_share_the_experts_or_split_them(tmp_path: Path, model: Path, shared: bool, more: tuple) -> None:
    options = {"serve_arguments": "--max-num-seqs 8", "tensor_parallel": 2, "work": tmp_path / "work", "label": "a"}
    options |= {"more_plugins": "", "variables": (), "out": tmp_path / "out", "seconds": 5.0, "expert_parallel": shared}
    place = tool.Place(str(model), options)
    argv = place.work.serve(ServerArm.EPFUSE, 1234, tmp_path / "compiles").argv
    assert argv[-4 - len(more) :] == ("--max-num-seqs", "8", "--tensor-parallel-size", "2", *more)
    assert place.work.served == f"{model} --max-num-seqs 8 --tensor-parallel-size 2{''.join(f' {one}' for one in more)}"


def of_a_server(arm: str, model: str, p99: float) -> dict[str, object]:
    point = {"isl": 128, "osl": 256, "concurrency": 256, "new": True, "p99_ttft_ms": p99}
    first = {"seconds": 1.0}
    return {"part": "serve", "complete": True, "arm": arm, "model": model, "cold": False, "ready_s": 30.0,
            "first": first, "points": [point], "compiles": {}}  # fmt: skip


def test_a_wide_spread_of_ours_is_no_excuse() -> None:
    records = [of_a_server("none", "m", p99) for p99 in (637.0, 720.0)]
    for ours, reached in (((1049.0, 3225.0), False), ((100.0, 3225.0), False), ((650.0, 719.0), True)):
        rows = rows_of([*records, *(of_a_server("epfuse", "m", p99) for p99 in ours)])
        (row,) = [row for row in rows if "p99" in row.what]
        assert row.reached is reached, ours


def test_servers_of_other_arguments_are_other_rows() -> None:
    rows = rows_of([of_a_server("none", "m", 100.0), of_a_server("epfuse", "m --tensor-parallel-size 2", 900.0)])
    assert all(row.reached is None for row in rows)


def test_every_worker_that_runs_experts_is_named(tmp_path: Path) -> None:
    says = "INFO 11-29 20:57:16 [layer.py:95] epfuse runs experts in place of vLLM's MarlinExperts; on NVIDIA H200: so"
    (tmp_path / "log").write_text("".join(f"(Worker_TP{rank}_EP{rank} pid=1{rank}) {says}\n" for rank in (1, 0)))
    found = arms.what_the_log_says(tmp_path / "log", ServerArm.EPFUSE)
    assert (found["workers"], len(found["said"])) == (["Worker_TP0_EP0", "Worker_TP1_EP1"], 1)


def test_a_model_for_two_gpus_has_fifteen_layers_with_experts() -> None:
    config = arms.MODELS["minimax-m3-16"].config()
    assert (config["num_hidden_layers"], sum(config["moe_layer_freq"])) == (16, 15)
    assert len(config["sparse_attention_config"]["sparse_attention_freq"]) == 16
