"""Jobs as processes, here and behind an ssh that is an executable of ours and checks what it is given."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from epfuse.errors import ConfigError
from epfuse.serving.launchers import processes
from epfuse.serving.launchers.launcher import Accepted, CleanLook, JobPhase, Order, Rejected, Unreachable, Unsure
from epfuse.serving.launchers.local import LocalLauncher
from epfuse.serving.launchers.ssh import SshLauncher
from tests.processes import gone

HERE = socket.gethostname()
SLEEP = "import signal, time; print('began', flush=True); time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('began', flush=True); time.sleep(60)"

# Takes its options as OpenSSH does, and hands the rest to a shell, joined with spaces, as sshd does.
SSH = """#!{python}
import subprocess, sys
words = sys.argv[1:]
assert words[:2] == ["-oBatchMode=yes", "-oConnectTimeout=15"]
assert words[2:5] == ["-oServerAliveInterval=10", "-oServerAliveCountMax=3", "--"]
host, command = words[5], words[6:]
open({calls!r}, "a").write(host + " " + " ".join(command) + "\\n")
if host == "away":
    print("ssh: connect to host away port 22: Connection timed out", file=sys.stderr)
    sys.exit(255)
print("Welcome to", host, flush=True)
if host == "garbled":
    sys.exit(0)
sys.exit(subprocess.run(["sh", "-c", " ".join(command)], start_new_session=True).returncode)
"""


@pytest.fixture
def order(tmp_path: Path) -> Iterator[Order]:
    key = f"r{os.getpid()}-{time.monotonic_ns()}-1"
    yield Order(key, (sys.executable, "-c", SLEEP, "it's; $(x)", "--key", key), tmp_path)
    processes.stop(key, 0.0)


def wait(log: Path) -> None:
    end = time.monotonic() + 120
    while not log.exists() or "began" not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_local_job_is_started_once_found_and_stopped(order: Order) -> None:
    local = LocalLauncher()
    assert local.look(HERE, [order.key]) == CleanLook(())
    first = local.submit(order, HERE)
    assert isinstance(first, Accepted)
    assert local.submit(order, HERE) == first
    wait(order.folder / "job.log")
    seen = local.look(HERE, ["other", order.key])
    assert isinstance(seen, CleanLook)
    assert [(job.key, job.job, job.phase) for job in seen.jobs] == [(order.key, first.job, JobPhase.RUNNING)]
    assert local.cancel(HERE, order.key) is None
    assert local.look(HERE, [order.key]) == CleanLook(())


def test_a_job_that_has_no_command_line_yet_is_not_started_twice(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = itertools.count()
    listed = processes._processes
    nameless = lambda: ((pid, session, [""]) for pid, session, _ in listed())  # noqa: E731
    monkeypatch.setattr(processes, "_processes", lambda: nameless() if next(looks) < 4 else listed())
    pid = processes.start(order.key, order.folder, order.argv)
    assert processes.start(order.key, order.folder, order.argv) == pid


def test_a_job_that_ignores_sigterm_is_killed_with_its_session(order: Order) -> None:
    child = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); {STUBBORN}"
    )
    stubborn = Order(order.key, (sys.executable, "-c", child, "--key", order.key), order.folder)
    pid = processes.start(stubborn.key, stubborn.folder, stubborn.argv)
    wait(order.folder / "job.log")
    session = [number for number, leader, _ in processes._processes() if leader == pid]
    assert len(session) == 2
    processes.stop(order.key, 0.2)
    assert gone(session)


def test_a_job_outlives_a_killed_dispatcher_and_the_next_one_finds_it(order: Order) -> None:
    code = (
        "import sys, time; from pathlib import Path; from epfuse.serving.launchers import processes; "
        "print(processes.start(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]), flush=True); time.sleep(60)"
    )
    argv = [sys.executable, "-c", code, order.key, str(order.folder), *order.argv[:-2], "--key", order.key]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, process_group=0) as dispatcher:
        assert dispatcher.stdout is not None
        pid = int(dispatcher.stdout.readline())
        os.killpg(dispatcher.pid, signal.SIGKILL)
    wait(order.folder / "job.log")
    assert processes.running(order.key) == [pid]
    assert processes.start(order.key, order.folder, order.argv) == pid


def test_what_can_not_be_started_is_rejected(tmp_path: Path) -> None:
    python = str(tmp_path / "no-python")
    answer = LocalLauncher().submit(Order("k-1", (python, "--key", "k-1"), tmp_path), HERE)
    assert answer == Rejected(f"{python} can't be started: No such file or directory")


def test_another_machines_processes_are_not_absent(order: Order) -> None:
    seen = LocalLauncher().look("elsewhere", [order.key])
    assert isinstance(seen, Unreachable)
    assert f"processes of elsewhere, this is {HERE}: resume the run there" in seen.why
    assert LocalLauncher().cancel("elsewhere", order.key) == seen.why


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its calls."""
    (tmp_path / "bin").mkdir()
    calls = tmp_path / "ssh.calls"
    (tmp_path / "bin" / "ssh").write_text(SSH.format(python=sys.executable, calls=str(calls)))
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return calls


def test_a_job_behind_ssh_is_started_once_found_and_stopped(order: Order, ssh: Path) -> None:
    launcher = SshLauncher(("node1", "user@node2"), sys.executable)
    assert launcher.places == {"node1": 1, "user@node2": 1}
    assert launcher.look("node1", [order.key]) == CleanLook(())
    first = launcher.submit(order, "node1")
    assert isinstance(first, Accepted)
    assert launcher.submit(order, "node1") == first
    seen = launcher.look("node1", ["other", order.key])
    assert isinstance(seen, CleanLook)
    assert [(job.key, job.job) for job in seen.jobs] == [(order.key, first.job)]
    words = Path(f"/proc/{first.job}/cmdline").read_bytes().split(b"\0")[:-1]
    assert [word.decode() for word in words] == list(order.argv)
    assert launcher.cancel("node1", order.key) is None
    assert launcher.look("node1", [order.key]) == CleanLook(())
    line = ssh.read_text().splitlines()[0]
    assert line.startswith("node1 ")
    agent = shlex.split(shlex.split(line)[1]) if len(shlex.split(line)) == 2 else shlex.split(line)[1:]
    assert agent == [sys.executable, "-m", "epfuse.serving.launchers.processes", "look", order.key]


def test_a_host_that_is_away_leaves_a_doubt(order: Order, ssh: Path) -> None:
    launcher = SshLauncher(("away", "garbled"), sys.executable)
    for host in launcher.places:
        assert isinstance(launcher.submit(order, host), Unsure)
        assert isinstance(launcher.look(host, [order.key]), Unreachable)
        assert launcher.cancel(host, order.key) is not None
    assert "Connection timed out" in str(launcher.probe("away"))


@pytest.mark.parametrize("host", ["-oProxyCommand=x", "", "a b", "a;b", "$(a)", "a\n", "../a", "a/"])
def test_a_host_that_is_none_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="host is"):
        SshLauncher((host,), "python3")


def test_ssh_without_hosts_is_refused() -> None:
    with pytest.raises(ConfigError, match="no hosts"):
        SshLauncher((), "python3")
    with pytest.raises(ConfigError, match="twice"):
        SshLauncher(("a", "a"), "python3")


def test_the_agent_says_how_it_is_used() -> None:
    argv = [sys.executable, "-m", "epfuse.serving.launchers.processes", "begin"]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "usage: start KEY FOLDER ARGV | look KEY... | stop KEY" in ended.stderr
