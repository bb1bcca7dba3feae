"""Jobs beside stub servers: each fault ends as what it is, and nothing is left running."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from epfuse.errors import ConfigError
from epfuse.serving import job as jobs
from epfuse.serving import leg as legs
from epfuse.serving.claim import Claim, holder_of, revoke
from epfuse.serving.client import run_client
from epfuse.serving.done import End
from epfuse.serving.environments import Task
from epfuse.serving.evals import read_evals
from epfuse.serving.gate import Distance, Reading, Reference
from epfuse.serving.job import main, run
from epfuse.serving.leg import MOST_NOISE, own_result
from epfuse.serving.point import AccuracyGate, Arm, Client, Deadlines, Point, PutIn, Venv
from epfuse.serving.server import MARK, Server, ServerFault, free_port, marked_processes, port_is_free
from tests.serving.points import KEY, ending, one_arm, point_job, start, stub, two_arms, write


def stubs_alive(port: int) -> list[int]:
    """Processes with a server's mark that have this port in their command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as environ, open(f"/proc/{pid}/cmdline", "rb") as line:
                if MARK.encode() in environ.read() and str(port).encode() in line.read().split(b"\0"):
                    found.append(int(pid))
        except OSError:
            continue
    return found


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """Asking an arm for its packages takes a process more."""
    asked = jobs.answer
    monkeypatch.setattr(jobs, "answer", lambda *_: "{}")
    return asked


@pytest.fixture
def ended(tmp_path):
    """Run a job here and return its end; its servers must be gone."""

    def run_it(job):
        point = write(tmp_path / "p1", job)
        code = run(point, KEY)
        done = ending(point)
        assert (done.name, done.key) == ("p1", KEY)
        assert code == (0 if done.state is End.DONE else 1)
        assert not stubs_alive(job.port)
        assert port_is_free(job.port)
        return point, done

    return run_it


def test_abba_is_measured_and_recorded(ended, monkeypatch, packages):
    monkeypatch.setattr(jobs, "answer", packages)
    order = ("baseline", "candidate", "candidate", "baseline")
    point, done = ended(two_arms(order=order))
    assert done.state is End.DONE
    assert [leg.arm for leg in done.legs] == list(order)
    for leg in done.legs:
        result = json.loads((point.path / leg.folder / "result.json").read_text())
        assert leg.metrics["completed"] == result["completed"] == len(result["ttfts"]) == 20
        assert all(6 <= length <= 8 for length in result["input_lens"])  # 0.8 L to L
        assert all(len(itl) == length - 1 for itl, length in zip(result["itls"], result["output_lens"], strict=True))
        assert leg.gate.passed
        assert leg.gate.difference == 0.0
        assert json.loads((point.path / leg.folder / "gate.json").read_text())["readings"]
        assert (point.path / leg.folder / "server.log").read_text().startswith("stub starts")
    versions = json.loads(point.attempt(KEY).versions.read_text())
    assert versions["arms"]["baseline"]["packages"]["epfuse"]
    assert versions["gpu_samples"] == "the point uses no GPU"
    assert versions["node"] == socket.gethostname()


@pytest.mark.parametrize(
    ("fault", "state", "words"),
    [
        ("dies", End.FAILED, r"died \(exit code 1\).*no such model"),
        ("unready", End.FAILED, "not ready after 1 s"),
        ("dies_after=9", End.FAILED, r"died \(exit code 7\)"),
        ("fatal_after=9", End.FAILED, "HIP out of memory"),
        ("serves=other", End.FAILED, "serves .*other.*, not 'stub-model'"),
        ("fails_every=8", End.FAILED, "of 20 requests failed, more than 5%: .*no memory left for this request"),
        ("nan", End.GATED_OUT, "nan a log probability"),
        ("silent", End.GATED_OUT, "no log probabilities"),
    ],
)
def test_a_fault_is_named_and_measures_nothing(ended, fault, state, words):
    ready = 1 if fault == "unready" else 120
    deadlines = Deadlines(ready=ready, gate=120, warmup=120, load=120, evals=120, stop=30, free=1, job=400)
    _, done = ended(one_arm(fault, deadlines=deadlines))
    assert done.state is state
    assert re.search(words, done.reason, re.DOTALL), done.reason
    assert done.legs[0].state is state
    assert not done.legs[0].metrics


@pytest.mark.parametrize("fault", ["shifted=0.3", "rare=0.6"])
def test_wrong_answers_have_no_speed(ended, fault):
    """A few tokens that are far off are caught as all tokens that are a little off."""
    _, done = ended(two_arms(fault))
    assert done.state is End.GATED_OUT
    assert "99th percentile" in done.reason
    baseline, candidate = done.legs
    assert baseline.state is End.DONE
    assert candidate.state is End.GATED_OUT
    assert not candidate.metrics
    assert not candidate.gate.passed


def test_a_few_failed_requests_are_told_and_count(ended):
    client = Client(tool="builtin", prompts=40, concurrency=2, warmups=0, isl=8, osl=4)
    _, done = ended(one_arm("fails_every=25", client=client))
    assert done.state is End.DONE
    assert done.legs[0].metrics["failed"] == 1


def test_a_baseline_that_does_not_repeat_itself_lets_nobody_pass():
    reference = Reference(Reading(((-1.0, -2.0),), ((),)), Distance(2 * MOST_NOISE, 1.0))
    assert not own_result(reference).passed


def test_a_taken_port_starts_no_server(tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        job = one_arm(port=other.getsockname()[1])
        point = write(tmp_path / "p1", job)
        assert run(point, KEY) == 1
        assert "is taken" in ending(point).reason
        assert not (point.path / ending(point).legs[0].folder / "server.log").exists()


def test_an_older_server_that_answers_on_the_port_is_not_taken_for_the_new_one(tmp_path):
    job = one_arm()
    older = subprocess.Popen([part.replace("{port}", str(job.port)) for part in job.arms[0].server.argv])
    try:
        end = time.monotonic() + 60
        while port_is_free(job.port) and time.monotonic() < end:
            time.sleep(0.05)
        point = write(tmp_path / "p1", job)
        assert run(point, KEY) == 1
        assert older.poll() is None  # it is somebody's
    finally:
        older.kill()
        older.wait()
    assert f"port {job.port} is taken" in ending(point).reason
    assert not ending(point).legs[0].metrics


@pytest.mark.parametrize("freed", [False, True])
def test_a_gpu_in_use_is_waited_for_with_a_limit(ended, tmp_path, monkeypatch, freed):
    """A server that shares its GPU is a slow server, and nobody would know why."""
    memory = tmp_path / "memory"
    memory.write_text("71234")
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho 0, 1980, 2619, 412.31, $(cat {memory}), 54, 99\n")
    if freed:  # by the tool's third look
        count = tmp_path / "count"
        tool.write_text(tool.read_text() + f"echo >> {count}; [ $(wc -l < {count}) -lt 3 ] || echo 4 > {memory}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    patience = Deadlines(ready=120, gate=120, warmup=120, load=120, stop=30, free=60 if freed else 1, job=400)
    point, done = ended(one_arm(gpus=1, gpu_vendor="nvidia", deadlines=patience))
    if freed:
        assert done.state is End.DONE
        return
    assert done.state is End.FAILED
    assert "GPUs [0] hold memory of another process for 1 s: no server was started" in done.reason
    assert not (point.path / done.legs[0].folder / "server.log").exists()


def test_a_worker_with_a_session_of_its_own_ends_too(ended):
    point, done = ended(one_arm("worker=stubborn", deadlines=Deadlines(stop=0.5, ready=120, free=1)))
    assert done.state is End.DONE
    log = (point.path / done.legs[0].folder / "server.log").read_text()
    pid = next(line for line in log.splitlines() if line.startswith("worker")).split()[1]
    assert not is_alive(pid)


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_missing_model_is_named(ended, tmp_path):
    model = str(tmp_path / "nowhere")
    _, done = ended(one_arm(needs=(model,)))
    assert done.state is End.FAILED
    assert model in done.reason
    assert not done.legs


def test_a_program_that_is_not_there(ended):
    _, done = ended(point_job(Arm(name="baseline", server=stub().model_copy(update={"argv": ("no-such-server",)}))))
    assert "no-such-server can't be started" in done.reason


@pytest.mark.parametrize(
    ("how", "said", "words"),
    [
        (PutIn.NOT, "says=epfuse runs experts in place of X", "is without epfuse, but its log says"),
        (PutIn.PLUGIN, "says=nothing", "no worker's log says that it runs experts"),
        (PutIn.PLUGIN, "says=epfuse leaves experts to X", "epfuse left the experts to vLLM"),
        (PutIn.PLUGIN, "says=epfuse runs experts in place of X", None),
    ],
)
def test_an_arm_is_what_it_says(ended, how, said, words):
    """Or the comparison would be one of a thing with itself."""
    _, done = ended(point_job(Arm(name="baseline", server=stub(said), epfuse=how)))
    assert done.reason == "" if words is None else words in done.reason


def test_a_full_disk_is_an_end_too(ended, monkeypatch):
    """What the job wrote fails; the end was set aside."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(legs, "write_atomic", full)
    _, done = ended(one_arm())
    assert done.state is End.FAILED
    assert "No space left on device" in done.reason


def test_a_full_disk_under_the_server_is_fatal(ended):
    _, done = ended(one_arm("says=OSError: [Errno 28] No space left on device"))
    assert done.state is End.FAILED
    assert "No space left on device" in done.reason


def test_a_second_copy_touches_nothing(tmp_path):
    point = write(tmp_path / "p1", one_arm())
    claim = Claim.take(point.path, KEY)
    assert run(point, KEY) == 0
    assert run(point, "run-p1-2") == 0
    assert claim.held
    assert not point.done.exists()
    assert not (point.path / "attempts").exists()


def test_an_ended_point_is_not_run_again(tmp_path):
    point = write(tmp_path / "p1", one_arm())
    point.done.write_text("{}")
    assert run(point, KEY) == 0
    assert holder_of(point.path) is None


@pytest.mark.parametrize("key", ["run-p1-0", "run-p2-1", "other-p1-1", "run-p1-1-2", ""])
def test_anothers_key_is_refused(tmp_path, key):
    point = write(tmp_path / "p1", one_arm())
    with pytest.raises(ConfigError, match="key"):
        run(point, key)


def test_a_point_that_is_none(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        sys.exit(main([str(tmp_path), "--key", KEY]))
    assert ended.value.code == 2
    assert "point.json" in capsys.readouterr().err


def until(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def phase_of(point) -> str:
    file = point.running / "phase"
    return file.read_text() if file.exists() else ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_server_and_is_told(tmp_path, number):
    job = one_arm("step=0.2")
    point = write(tmp_path / "p1", job)
    process = start(point)
    until(lambda: phase_of(point) == "running")
    process.send_signal(number)
    assert process.wait(120) == 1
    assert number.name in ending(point).reason
    assert ending(point).state is End.FAILED
    assert not stubs_alive(job.port)


def test_a_claim_that_is_revoked_under_way_leaves_no_end(tmp_path):
    job = one_arm("step=2")  # a load that outlasts the wait below
    point = write(tmp_path / "p1", job)
    process = start(point)
    until(lambda: phase_of(point) == "running")
    assert revoke(point.path, KEY)
    following = Claim.take(point.path, "run-p1-2")
    assert process.wait(120) == 1
    assert not point.done.exists()
    assert following.held
    assert not stubs_alive(job.port)


def test_a_killed_job_leaves_no_server(tmp_path):
    job = one_arm("step=0.2")
    point = write(tmp_path / "p1", job)
    process = start(point)
    until(lambda: phase_of(point) == "running")
    process.kill()
    process.wait()
    until(lambda: not stubs_alive(job.port))
    assert not point.done.exists()
    assert holder_of(point.path).key == KEY


def test_two_jobs_at_once_are_one(tmp_path):
    point = write(tmp_path / "p1", one_arm())
    copies = [start(point), start(point)]
    assert [copy.wait(180) for copy in copies] == [0, 0]
    assert ending(point).state is End.DONE
    assert len(list((point.path / "attempts").iterdir())) == 1


def test_a_batch_shell_that_becomes_the_job_hands_on_signals(tmp_path):
    """As sbatch's script ends: what the batch system sends to the shell reaches the job."""
    job = one_arm("step=0.2")
    point = write(tmp_path / "p1", job)
    script = tmp_path / "batch.sh"
    script.write_text('#!/bin/sh\nexec "$@"\n')
    argv = ["sh", str(script), sys.executable, "-m", "epfuse.serving.job", str(point.path), "--key", KEY]
    shell = subprocess.Popen(
        argv, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stderr=subprocess.DEVNULL
    )
    until(lambda: phase_of(point) == "running")
    shell.send_signal(signal.SIGUSR1)
    assert shell.wait(120) == 1
    assert "SIGUSR1" in ending(point).reason


def test_evals_have_a_floor_and_no_metric_is_no_pass(ended, tmp_path):
    tool = tmp_path / "lm_eval.py"
    tool.write_text(
        "import json, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--output_path') + 1]) / 'stub'\n"
        "folder.mkdir()\n"
        "score = json.loads(sys.argv[1])\n"
        "(folder / 'results_1.json').write_text(json.dumps({'results': {'gsm8k': score}}))\n"
    )
    base = one_arm()
    point = Point.model_validate(base.point.model_dump() | {"is_eval": True, "eval_only": True})

    def with_score(score):
        command = (sys.executable, str(tool), json.dumps(score))
        gate = base.gate.model_copy(update={"evals": ("gsm8k",), "eval_command": command})
        folder = write(tmp_path / f"p{time.monotonic_ns()}", base.model_copy(update={"gate": gate, "point": point}))
        run(folder, KEY)
        return ending(folder)

    good = with_score({"exact_match,strict-match": 0.95, "exact_match_stderr,strict-match": 0.01})
    assert good.state is End.DONE
    assert good.legs[0].gate.evals == {"gsm8k/exact_match,strict-match": 0.95}
    assert good.legs[0].metrics == {}
    assert "no exact_match" in with_score({"acc,none": 1.0}).reason
    low = with_score({"exact_match,strict-match": 0.95, "exact_match,flexible-extract": 0.0})
    assert low.state is End.GATED_OUT
    assert "flexible-extract is 0.0000, below 0.9" in low.reason


@pytest.mark.parametrize("fault", ["", "dies"])
def test_a_patched_environment_is_taken_back(ended, tmp_path, fault):
    """Also after a leg that failed: the next arm may be without epfuse."""
    tool, calls = tmp_path / "venv" / "bin" / "python", tmp_path / "calls"
    tool.parent.mkdir(parents=True)
    tool.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    tool.chmod(0o755)
    faults = [fault] if fault else ["says=epfuse runs experts in place of X"]
    arm = Arm(name="baseline", server=stub(*faults), epfuse=PutIn.PATCH, environment=Venv(path=str(tmp_path / "venv")))
    _, done = ended(point_job(arm))
    assert done.state is (End.FAILED if fault else End.DONE)
    assert calls.read_text().splitlines() == [f"-m epfuse vllm patch {verb}" for verb in ("apply", "revert")]


def test_a_metric_that_is_no_number_is_none(tmp_path):
    gate = AccuracyGate(evals=("gsm8k",))
    for value in ("true", "NaN", "1" + "0" * 400, '"1.0"', "null"):
        (tmp_path / "results_1.json").write_text(f'{{"results": {{"gsm8k": {{"exact_match,strict-match": {value}}}}}}}')
        found, reason = read_evals(gate, tmp_path)
        assert not found
        assert reason


def test_an_engine_that_does_not_end_its_container_keeps_no_server_alive(tmp_path):
    """What ends a container may be missing or hang; the kill and the look for what is left come all the same."""
    argv = (sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)")
    task = Task(argv, dict(os.environ), ending=("no-such-engine-of-epfuse",))
    server = Server(task, tmp_path / "log", free_port(), "mark-of-this-test")
    server.stop(0.1)
    assert marked_processes("mark-of-this-test") == []
    run_client(Task((sys.executable, "-c", ""), dict(os.environ), task.ending), tmp_path / "log", "it", int, 0.1)


def test_a_log_without_line_ends_is_read_once(tmp_path):
    code = "import sys, time; print('x' * (3 << 20), end='', flush=True); sys.stdin.read(); time.sleep(600)"
    task = Task((sys.executable, "-c", code), dict(os.environ))
    server = Server(task, tmp_path / "log", free_port(), "mark-of-a-long-line")
    try:
        until(lambda: server.log.stat().st_size == 3 << 20)
        server.check()
        assert server._read == 3 << 20
        with server.log.open("ab") as log:
            log.write(b"\nfine\rCUDA out of memory\n")
        with pytest.raises(ServerFault, match="says 'CUDA out of memory'"):
            server.check()
    finally:
        server.stop(0.1)
