"""A server that dies while something talks to it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from epfuse.serving.environments import prepare
from epfuse.serving.point import Venv
from epfuse.serving.server import Server, ServerFault


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import time; time.sleep(0.5); raise SystemExit(3)", r"the server died \(exit code 3\)"),
        ("import time; time.sleep(60)", "a request has no answer"),
    ],
)
def test_a_connection_that_breaks_off_is_the_servers_death_if_it_dies(tmp_path: Path, program: str, words: str) -> None:
    argv = (sys.executable, "-c", program)
    task = prepare(Venv(), argv, {}, name="", folders=(), gpus=0, vendor="none")
    server = Server(task, tmp_path / "server.log", 1, "mark-of-this-test", look=0.05)

    def breaks_off() -> None:
        raise ServerFault("a request has no answer")

    try:
        with pytest.raises(ServerFault, match=words):
            server.during(breaks_off, lambda: None)
    finally:
        server.stop(1.0)
