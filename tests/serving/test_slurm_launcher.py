"""The slurm launcher against executables that answer as Slurm 22.05 was seen to, and that note their arguments."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from epfuse.errors import ConfigError
from epfuse.serving.launchers import slurm as module
from epfuse.serving.launchers.launcher import (
    Accepted,
    CleanLook,
    JobPhase,
    Order,
    Rejected,
    Sighting,
    Unreachable,
    Unsure,
)
from epfuse.serving.launchers.slurm import SlurmLauncher, batch_script
from epfuse.serving.point import Slurm

STUB = """#!/bin/sh
name=$(basename "$0")
for word in "$name" "$@"; do printf '%s\\n' "$word"; done >> "{folder}/calls"
echo --- >> "{folder}/calls"
env > "{folder}/$name.env"
cat "{folder}/$name.out" 2>/dev/null
cat "{folder}/$name.err" >&2 2>/dev/null
sleep "$(cat "{folder}/$name.sleep" 2>/dev/null || echo 0)"
exit "$(cat "{folder}/$name.rc" 2>/dev/null || echo 0)"
"""
UP = "Slurmctld(primary) at localhost is UP\n"


class Stubs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("sbatch", "squeue", "sacct", "scancel", "scontrol"):
            (folder / name).write_text(STUB.format(folder=folder))
            (folder / name).chmod(0o755)
        self.answer("scontrol", UP)
        self.answer("sacct", "", "Slurm accounting storage is disabled\n", 1)

    def answer(self, name: str, out: str = "", err: str = "", code: int = 0, seconds: float = 0) -> None:
        for kind, value in (("out", out), ("err", err), ("rc", str(code)), ("sleep", str(seconds))):
            (self.folder / f"{name}.{kind}").write_text(value)

    def calls(self, name: str) -> list[list[str]]:
        text = (self.folder / "calls").read_text() if (self.folder / "calls").exists() else ""
        calls = [call.strip("\n").split("\n") for call in text.split("---\n") if call]
        return [call[1:] for call in calls if call[0] == name]


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stubs:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return Stubs(tmp_path / "bin")


@pytest.fixture
def order(tmp_path: Path) -> Order:
    folder = tmp_path / "50% of it"
    folder.mkdir()
    argv = ("python", "-m", "job", "/a folder/it's", "--key", "r-p-1")
    return Order("r-p-1", argv, folder, node="n7", seconds=90)


def launcher(**options: object) -> SlurmLauncher:
    return SlurmLauncher(Slurm(**options), sleep=lambda seconds: None)  # type: ignore[arg-type]


def test_sbatch_gets_the_key_thrice_and_no_requeue(stubs: Stubs, order: Order) -> None:
    stubs.answer("sbatch", "17\n")
    assert launcher(partition="gpu", exclusive=True, arguments=("-J", "other", "--requeue")).submit(
        order, "slurm"
    ) == Accepted("17")
    (call,) = stubs.calls("sbatch")
    script = order.folder / "batch.sh"
    assert call == [
        *("-J", "other", "--requeue", "--partition=gpu", "--nodelist=n7", "--time=12"),
        *("--exclusive", "--parsable", "-N", "1", "-n", "1"),
        *("-J", "r-p-1", "--comment=r-p-1", "--no-requeue", "--dependency=singleton", "--open-mode=append"),
        *("-o", str(order.folder / "job.log").replace("%", "%%"), str(script)),
    ]
    assert script.read_text() == "#!/bin/bash\nexec python -m job '/a folder/it'\"'\"'s' --key r-p-1\n"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_a_script_runs_the_words_and_nothing_else(tmp_path: Path) -> None:
    words = ["a b", "$(touch x)", "`touch x`", "'", '"', "\\", ";", "&&", "*", "~", "#", "!", "-n", "ä"]
    script = tmp_path / "batch.sh"
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    script.write_text(batch_script(["python3", "-c", show, *words]))
    out = subprocess.run(["bash", str(script)], cwd=tmp_path, capture_output=True, check=True).stdout
    assert json.loads(out) == words
    assert [path.name for path in tmp_path.iterdir()] == ["batch.sh"]
    with pytest.raises(ConfigError, match=r"'a\\nb'; control characters"):
        batch_script(["a\nb"])
    assert shlex.split(batch_script(words).splitlines()[1])[1:] == words


@pytest.mark.parametrize(
    ("out", "err", "code"),
    [
        ("", "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", 1),
        ("", "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", 1),
        ("", "sbatch: error: Batch job submission failed: Protocol authentication error", 1),
        ("", "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying", 1),
        ("", "sbatch: error: QOSMaxSubmitJobPerUserLimit", 1),
        ("", "", 1),
        ("", "", 0),
        ("Submitted batch job 17", "", 0),
        ("0", "", 0),
        ("17 18", "", 0),
    ],
)
def test_whatever_is_no_clear_answer_is_a_doubt(stubs: Stubs, order: Order, out: str, err: str, code: int) -> None:
    stubs.answer("sbatch", out, err, code)
    assert isinstance(launcher().submit(order, "slurm"), Unsure)
    assert len(stubs.calls("sbatch")) == 1  # it never tries again by itself


def test_an_sbatch_that_does_not_answer_is_a_doubt(stubs: Stubs, order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMMAND_SECONDS", 0.3)
    stubs.answer("sbatch", "", "", 0, seconds=30)
    answer = launcher().submit(order, "slurm")
    assert answer == Unsure("sbatch: it did not answer in time")


@pytest.mark.parametrize("text", module.FINAL)
def test_final_texts_reject(stubs: Stubs, order: Order, text: str) -> None:
    stubs.answer("sbatch", "", f"sbatch: error: Batch job submission failed: {text}\n", 1)
    answer = launcher().submit(order, "slurm")
    assert isinstance(answer, Rejected)
    assert text in answer.why


def test_a_look_names_every_key_and_reads_every_state(stubs: Stubs) -> None:
    stubs.answer("squeue", "7|k-1|PENDING|Resources\n9|k-1|RUNNING|None\n8|k-2|COMPLETED|None\n5|other|RUNNING|None\n")
    assert launcher().look("slurm", ["k-1", "k-2"]) == CleanLook(
        (
            Sighting("k-1", "7", JobPhase.WAITING, "PENDING", "Resources"),
            Sighting("k-1", "9", JobPhase.RUNNING, "RUNNING"),
            Sighting("k-2", "8", JobPhase.ENDED, "COMPLETED"),
        )
    )
    assert stubs.calls("squeue") == [["-h", "-a", "-t", "all", "--me", "--name=k-1,k-2", "-o", "%i|%j|%T|%r"]]


def test_accounting_adds_what_has_ended_and_nothing_that_waits(stubs: Stubs) -> None:
    """A job that a killed controller lost stays PENDING in the accounting for ever."""
    stubs.answer("squeue", "")
    stubs.answer("sacct", "3|k-1|CANCELLED by 1000|None\n4|k-1|PENDING|None\n5|k-1|NODE_FAIL|None\n")
    assert launcher().look("slurm", ["k-1"]) == CleanLook(
        (Sighting("k-1", "3", JobPhase.ENDED, "CANCELLED"), Sighting("k-1", "5", JobPhase.ENDED, "NODE_FAIL"))
    )


@pytest.mark.parametrize(
    ("command", "out", "err", "code"),
    [
        ("scontrol", "Slurmctld(primary) at localhost is DOWN\n", "", 1),
        ("scontrol", "Slurmctld(primary) at localhost is DOWN\n", "", 0),
        ("squeue", "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)", 1),
        ("squeue", "", "slurm_load_jobs error: Socket timed out on send/recv operation", 1),
        ("squeue", "7|k-1|", "", 0),
        ("squeue", "something else\n", "", 0),
        ("sacct", "", "sacct: error: Problem talking to the database: Connection refused", 1),
        ("sacct", "x", "", 0),
    ],
)
def test_a_look_without_every_answer_is_none(stubs: Stubs, command: str, out: str, err: str, code: int) -> None:
    stubs.answer("squeue", "7|k-1|PENDING|Resources\n")
    stubs.answer(command, out, err, code)
    assert isinstance(launcher().look("slurm", ["k-1"]), Unreachable)


def test_a_look_is_tried_thrice_with_growing_pauses(stubs: Stubs) -> None:
    pauses: list[float] = []
    stubs.answer("squeue", "", "slurm_load_jobs error: Socket timed out", 1)
    asked = SlurmLauncher(sleep=pauses.append)
    assert isinstance(asked.look("slurm", ["k-1"]), Unreachable)
    assert len(stubs.calls("squeue")) == 3
    assert 0.5 <= pauses[0] <= 1.5 <= 2 * pauses[1] < 5


def test_a_cancel_goes_by_name_and_never_by_number(stubs: Stubs) -> None:
    assert launcher().cancel("slurm", "k-1") is None
    assert stubs.calls("scancel") == [["--me", "--name=k-1"]]
    stubs.answer("scancel", "", "scancel: error: Kill job error on job id 7: Socket timed out", 140)
    assert "exit code 140" in str(launcher().cancel("slurm", "k-1"))


def test_patience_is_beyond_the_clusters_message_timeout(stubs: Stubs) -> None:
    stubs.answer("scontrol", "MessageTimeout          = 10 sec\n")
    assert launcher().patience() == 16.0
    stubs.answer("scontrol", "", "", 1)
    assert launcher().patience() > 60  # not known: the longer wait


def test_presets_of_the_users_shell_change_no_meaning(
    stubs: Stubs, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SBATCH_ARRAY_INX", "SBATCH_REQUEUE", "SQUEUE_FORMAT", "SQUEUE_STATES", "SACCT_FORMAT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    stubs.answer("sbatch", "17\n")
    stubs.answer("squeue", "")
    launcher().submit(order, "slurm")
    launcher().look("slurm", ["k-1"])
    seen = (stubs.folder / "sbatch.env").read_text() + (stubs.folder / "squeue.env").read_text()
    assert "SBATCH_ACCOUNT=mine\n" in seen
    assert "LC_ALL=C\n" in seen
    assert not [
        line for line in seen.splitlines() if line.startswith(("SBATCH_A", "SBATCH_R", "SQ")) and "ACC" not in line
    ]


def test_a_machine_without_slurm_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="launcher is 'slurm', but scontrol is not installed here"):
        launcher().probe("slurm")


def test_thousands_of_keys_fit_into_arguments(stubs: Stubs) -> None:
    keys = [f"{'k' * 150}-{n}" for n in range(1100)]
    stubs.answer("squeue", f"7|{keys[-1]}|RUNNING|None\n")
    assert launcher().look("slurm", keys) == CleanLook((Sighting(keys[-1], "7", JobPhase.RUNNING, "RUNNING"),))
    assert len(stubs.calls("squeue")) == 3
