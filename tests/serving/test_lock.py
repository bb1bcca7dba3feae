from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from epfuse.serving import lock as lock_module
from epfuse.serving.lock import RunLock, RunLocked, read_owner

HOLD = """
import sys, time
from pathlib import Path
from epfuse.serving.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_dispatchers_do_not_hold_it_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with RunLock(path):
        with pytest.raises(RunLocked, match=f"is being run by process {os.getpid()} on {socket.gethostname()}"):
            RunLock(path)
        with pytest.raises(RunLocked):  # nobody takes over from the living
            RunLock(path, take_over=True)
    with RunLock(path) as again:
        assert again.stale is None


def test_the_lock_of_a_killed_dispatcher_is_stale(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(RunLocked, match=f"process {process.pid} "):
            RunLock(path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with RunLock(path) as lock:
        assert lock.stale is not None
        assert lock.stale.pid == process.pid


def test_another_machines_lock_is_said_and_taken_over_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    path.write_text('{"host": "node9", "machine": "m", "pid": 77, "token": "t"}')
    with pytest.raises(RunLocked, match=r"process 77 on node9, which can't be seen from .*--take-over"):
        RunLock(path)
    assert "node9" in path.read_text()
    with RunLock(path, take_over=True) as lock:
        lock.check()
        assert lock.stale is not None
    # the same name, another machine
    path.write_text(f'{{"host": "{socket.gethostname()}", "machine": "other", "pid": 77, "token": "t"}}')
    with pytest.raises(RunLocked, match="--take-over"):
        RunLock(path)
    # the same machine after a restart, whatever has its number now
    monkeypatch.setattr(lock_module, "_machine", lambda: "other")
    with RunLock(path):
        pass


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"host": 1}', '{"host": [], "machine": 1, "pid": {}, "token": 1}']
)
def test_a_torn_lock_is_nobodys(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lock"
    path.write_text(text)
    assert read_owner(path) is None
    with RunLock(path) as lock:
        assert read_owner(path) == lock._me
    assert path.read_text() == ""
