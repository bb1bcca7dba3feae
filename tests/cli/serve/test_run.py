"""``epfuse serve run``, ``status``, ``cancel`` and ``resume`` with jobs that measure nothing."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from epfuse.cli.main import main
from epfuse.serving.journal import PointState, read_journal
from epfuse.serving.layout import RunFolder
from tests.serving import stub_job
from tests.serving.small_runs import make_run, open_run
from tests.serving.stub_job import events

# In place of the interpreter of the jobs: `-m epfuse.serving.job` is the stub.
PYTHON = f"""#!/bin/sh
shift 2
exec '{sys.executable}' '{stub_job.__file__}' "$@"
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return str(tmp_path / "python")


def new_run(tmp_path: Path, **how: object) -> RunFolder:
    # jobs are found by their key on the whole machine, where other processes test too
    folder = make_run(tmp_path / "run", ["a", "b"], name=f"t-{secrets.token_hex(4)}")
    (folder.path / "points" / "stub.json").write_text(json.dumps({"seconds": 0.05, **how}))
    return folder


def serve(*words: object) -> Result:
    return CliRunner().invoke(main, ["serve", *map(str, words)])


def states(folder: RunFolder) -> list[PointState]:
    return [change.state for change in read_journal(folder.journal).points.values()]


def background(folder: RunFolder, python: str, command: str = "resume") -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "epfuse", "serve", command, str(folder.path), "--python", python, "--poll", "0.1"]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait(folder: RunFolder, state: PointState) -> None:
    end = time.monotonic() + 120
    while state not in states(folder):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_recipe_is_run_to_its_end(tmp_path: Path, python: str) -> None:
    """Each job's folder has no stub.json here: the stub's defaults."""
    out = tmp_path / "six"
    words = ["minimaxm3-mi300x", "--six", "--conc", "1"]
    assert serve("run", *words, "--out", out, "--python", python).exit_code == 2
    words = ["minimaxm3-mi300x", "--conc", "1", "--lengths", "1k1k"]
    result = serve("run", *words, "--out", out, "--python", python, "--poll", "0.1", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["all_done"], [point["state"] for point in record["points"]]) == (True, ["done"])
    assert ": done" in result.stderr
    assert serve("status", out).exit_code == 0
    assert "done" in serve("status", out).stdout
    again = serve("run", *words, "--out", out, "--python", python)
    assert again.exit_code == 2
    assert "has a run already" in again.stderr


def test_resume_runs_what_is_left_and_status_says_so(tmp_path: Path, python: str) -> None:
    folder = new_run(tmp_path)
    before = serve("status", folder.path, "--json")
    assert before.exit_code == 75
    assert not json.loads(before.stdout)["finished"]
    assert serve("resume", folder.path, "--python", python, "--poll", "0.1").exit_code == 0
    assert states(folder) == [PointState.DONE, PointState.DONE]
    assert Counter(event for event, _, _ in events(folder.path / "points")) == {"start": 2, "claim": 2, "end": 2}


def test_a_failed_point_is_exit_code_1_and_runs_again_only_when_asked(tmp_path: Path, python: str) -> None:
    folder = new_run(tmp_path, states={"b": "gated_out"}, reason="wrong answers")
    result = serve("resume", folder.path, "--python", python, "--poll", "0.1")
    assert result.exit_code == 1, result.output
    assert "wrong answers" in result.stdout
    assert states(folder) == [PointState.DONE, PointState.GATED_OUT]
    assert serve("resume", folder.path, "--python", python, "--poll", "0.1").exit_code == 1
    (folder.path / "points" / "stub.json").write_text("{}")
    assert serve("resume", folder.path, "--again", "--python", python, "--poll", "0.1").exit_code == 0
    done = folder.read_done("b")
    assert done is not None
    run = folder.read_run().name
    assert done.key == f"{run}-b-2"
    assert (folder.point("b").attempt(f"{run}-b-1").path / "done.json").exists()
    assert Counter(event for event, _, _ in events(folder.path / "points"))["start"] == 3


def test_ctrl_c_leaves_a_run_that_can_be_resumed(tmp_path: Path, python: str) -> None:
    folder = new_run(tmp_path, seconds=2.0)
    with background(folder, python) as process:
        wait(folder, PointState.RUNNING)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert f"epfuse serve resume {folder.path}" in err
    assert folder.lock.read_text() == ""
    assert serve("resume", folder.path, "--python", python, "--poll", "0.1").exit_code == 0
    assert Counter(event for event, _, _ in events(folder.path / "points")) == {"start": 2, "claim": 2, "end": 2}


def test_a_killed_dispatcher_is_said_and_its_job_is_found(tmp_path: Path, python: str) -> None:
    folder = new_run(tmp_path, seconds=2.0)
    with background(folder, python) as process:
        wait(folder, PointState.RUNNING)
        process.kill()
        process.communicate()
    assert serve("resume", folder.path, "--python", python, "--poll", "0.1").exit_code == 0
    history = read_journal(folder.journal)
    assert history.notes[0].text.startswith(f"the dispatcher before, process {process.pid} on ")
    assert Counter(event for event, _, _ in events(folder.path / "points")) == {"start": 2, "claim": 2, "end": 2}


def test_a_cancel_beside_a_dispatcher_is_done_by_it(tmp_path: Path, python: str) -> None:
    folder = new_run(tmp_path, seconds=60)
    with background(folder, python) as process:
        wait(folder, PointState.RUNNING)
        refused = serve("resume", folder.path)
        assert refused.exit_code == 2
        assert f"is being run by process {process.pid}" in refused.stderr
        result = serve("cancel", folder.path, "--poll", "0.1")
        process.communicate(timeout=120)
    assert process.returncode == 1
    assert result.exit_code == 1
    assert states(folder) == [PointState.CANCELLED, PointState.CANCELLED]


def test_a_cancel_without_a_dispatcher_ends_the_job_itself(tmp_path: Path, python: str) -> None:
    folder = new_run(tmp_path, seconds=60)
    with background(folder, python) as process:
        wait(folder, PointState.RUNNING)
        process.kill()
        process.communicate()
    result = serve("cancel", folder.path, "a", "--poll", "0.1", "--python", python)
    assert result.exit_code == 75, result.output  # b is still planned
    assert states(folder) == [PointState.CANCELLED, PointState.PLANNED]
    assert serve("cancel", folder.path, "c").exit_code == 2


def test_a_damaged_journal_is_exit_code_2(tmp_path: Path) -> None:
    folder = new_run(tmp_path)
    written = folder.journal.read_bytes()
    other = b"1" if written.startswith(b"0") else b"0"  # one checksum in sixteen begins with a 0
    folder.journal.write_bytes(other + written[1:] + b"x\n")
    for command in ("status", "resume", "cancel"):
        result = serve(command, folder.path)
        assert result.exit_code == 2
        assert "line 1: its checksum does not fit" in result.stderr


def test_a_folder_that_is_no_run_is_exit_code_2(tmp_path: Path) -> None:
    for command in ("status", "resume", "cancel"):
        result = serve(command, tmp_path)
        assert result.exit_code == 2
        assert "no run.json" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "a"], "--host is for --launcher ssh"),
        (["--slurm", "partition=a"], "--slurm is for --launcher slurm"),
        (["--launcher", "slurm", "--slurm", "wrap=a"], "no NAME=VALUE"),
        (["--name", "A b"], "--name is 'A b'"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    result = serve("run", "minimaxm3-mi300x", "--six", "--out", tmp_path / "x", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "x").exists()


def test_a_run_whose_journal_was_never_begun_begins(tmp_path: Path, python: str) -> None:
    folder = new_run(tmp_path)
    folder.journal.unlink()
    assert serve("resume", folder.path, "--python", python, "--poll", "0.1").exit_code == 0


def test_a_launcher_that_does_not_answer_is_exit_code_75(
    tmp_path: Path, python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run", ["a"], launcher="slurm")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'Slurmctld(primary) at localhost is DOWN'\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    result = serve("resume", folder.path, "--python", python, "--poll", "0.1", "--outage", "1")
    assert result.exit_code == 75, result.output
    assert (
        "1 of 1 points have not ended: slurm has not answered for 1 s; to go on: epfuse serve resume" in result.stderr
    )
    assert "is DOWN" in result.stdout
    lock, journal = open_run(folder)
    with lock, journal:
        assert journal.history.points["a"].state is PointState.PLANNED


def test_the_demonstration_brings_its_own_points(tmp_path):
    done = CliRunner().invoke(main, ["serve", "run", "--local-demo", "--out", str(tmp_path / "demo"), "--six"])
    assert done.exit_code == 2
    assert "leave six out" in done.stderr
    assert not (tmp_path / "demo").exists()


def test_a_run_without_a_recipe_is_refused():
    done = CliRunner().invoke(main, ["serve", "run"])
    assert done.exit_code == 2
    assert "Missing argument 'RECIPE'" in done.stderr
