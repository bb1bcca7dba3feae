"""One server process: free port and GPUs before it, readiness with a deadline, a watch all the time, an end of it all.

What it starts is found by a mark in its environment, so that a worker which made a process group of its own ends too.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from epfuse.children import Children
from epfuse.errors import EpfuseError
from epfuse.serving.environments import Task

T = TypeVar("T")

MARK = "EPFUSE_SERVE_MARK"
"""Environment variable that all processes of a server inherit."""
GONE_PATIENCE = 20.0
"""Seconds from SIGKILL until nothing is left; memory of eight GPUs takes some to be unmapped."""
DEATH_PATIENCE = 1.0
"""Seconds from a connection that breaks off until a process that dies is gone."""
LOG_TAIL = 20
LONGEST_LINE = 1 << 20
"""Bytes of a log's line; what is longer is read in parts, or each look would read all of it again."""
LARGEST_ANSWER = 64 << 20

FATAL = re.compile(
    rb"CUDA out of memory|HIP out of memory|OutOfMemoryError|EngineDeadError|Engine core initialization failed"
    rb"|EngineCore (?:failed|encountered)|WorkerProc (?:failed|initialization failed)|NCCL error|ncclUnhandled"
    rb"|Memory access fault by GPU|an illegal memory access|Segmentation fault|[Aa]ddress already in use"
    rb"|No space left on device"
)
"""Words after which a server never answers well again, though its first process may live on."""


class ServerFault(EpfuseError):
    """A server did not start, died, or could not be ended; the message says which and shows its log's end.

    Fix: what its log says; then ``epfuse serve resume --again``.
    """


class Server:
    """A server that was started.

    Args:
        task: what to start; `MARK` is added to its environment.
        log: its stdout and stderr go there, appended.
        port: where it will listen, on this machine.
        mark: text that no other server has.
        fatal: more regular expressions like `FATAL`.
        look: seconds between two looks at it.

    Raises:
        ServerFault: something listens on ``port`` already, or the program can't be started.
    """

    def __init__(
        self,
        task: Task,
        log: Path,
        port: int,
        mark: str,
        *,
        fatal: Sequence[str] = (),
        look: float = 1.0,
    ) -> None:
        if not port_is_free(port):
            raise ServerFault(f"port {port} is taken by another process; end that, or give the run another port")
        self.port = port
        self.log = log
        self._mark = mark
        self._ending = task.ending
        self._look = look
        self._fatal = [FATAL, *(re.compile(pattern.encode()) for pattern in fatal)]
        self._read = log.stat().st_size if log.exists() else 0
        self._children = Children()
        try:
            with log.open("ab") as out:
                self._process = subprocess.Popen(
                    list(task.argv),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env={**task.environment, MARK: mark},
                    process_group=self._children.id,
                )
        except OSError as error:
            self._children.end()
            raise ServerFault(f"{task.argv[0]} can't be started: {error.strerror or error}") from None

    def check(self) -> None:
        """Raise ServerFault if the server's first process is gone or its log says something fatal."""
        fatal = self._fatal_line()
        code = self._process.poll()
        if fatal is not None:
            raise ServerFault(f"the server's log says {fatal!r}; its end:\n{self._tail()}")
        if code is not None:
            how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            raise ServerFault(f"the server died ({how}); the end of its log:\n{self._tail()}")

    def wait_ready(self, deadline: float, model: str, watch: Callable[[], None]) -> float:
        """Wait until it answers and serves ``model``.

        Args:
            deadline: seconds that it may take.
            model: a name that ``/v1/models`` must list.
            watch: called at each look; it raises if there is nothing more to wait for.

        Returns:
            Seconds that it took.

        Raises:
            ServerFault: it dies, its log says something fatal, the time is over, or it serves other models.
        """
        begin = time.monotonic()
        while True:
            watch()
            self.check()
            waited = time.monotonic() - begin
            if self._healthy():
                break
            if waited > deadline:
                raise ServerFault(
                    f"the server is not ready after {deadline:.0f} s; the end of its log:\n{self._tail()}"
                )
            time.sleep(self._look)
        names = self._models()
        if model not in names:
            raise ServerFault(f"the server on port {self.port} serves {names}, not {model!r}")
        return waited

    def during(self, work: Callable[[], T], watch: Callable[[], None]) -> T:
        """Do something that talks to the server, and look at the server all the time.

        Args:
            work: runs in a thread; it must end by itself some time after the server has gone.
            watch: as in `wait_ready`.

        Raises:
            ServerFault: the server dies meanwhile; ``work`` is not waited for.
        """
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(self._look)
            watch()
            self.check()
        if errors:  # a connection that breaks off may be the first sign of a server that dies
            _until(lambda: self._process.poll() is not None, DEATH_PATIENCE)
        self.check()
        if errors:
            raise errors[0]
        return results[0]

    def stop(self, patience: float) -> None:
        """End all of it: asked first, then killed, then verified.

        Args:
            patience: seconds from SIGTERM to SIGKILL; a server of eight ranks takes some ten to end.

        Raises:
            ServerFault: a process of it is left, or its port is still taken.
        """
        self._signal_all(signal.SIGTERM)
        _until(lambda: not self._members(), patience)
        if self._ending:
            with contextlib.suppress(OSError, subprocess.SubprocessError):  # whether it is gone, is looked at below
                subprocess.run(
                    list(self._ending),
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=GONE_PATIENCE,
                    check=False,
                )
        self._signal_all(signal.SIGKILL)
        self._children.end()
        self._process.wait()
        if not _until(lambda: not self._members(), GONE_PATIENCE):
            raise ServerFault(f"processes {self._members()} of the server outlive SIGKILL")
        if not _until(lambda: port_is_free(self.port), GONE_PATIENCE):
            raise ServerFault(f"port {self.port} is still taken after the server's end")

    def _members(self) -> list[int]:
        self._process.poll()  # a zombie is no member
        return marked_processes(self._mark)

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in self._members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _fatal_line(self) -> str | None:
        with self.log.open("rb") as file:
            file.seek(self._read)
            while data := file.read(LONGEST_LINE):
                whole = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
                if not whole and len(data) < LONGEST_LINE:  # the rest of it comes with the next look
                    break
                whole = whole or len(data)
                for line in data[:whole].splitlines():
                    if any(pattern.search(line) for pattern in self._fatal):
                        return line.decode(errors="replace").strip()[:300]
                self._read += whole
                file.seek(self._read)
        return None

    def _tail(self) -> str:
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 8192))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-LOG_TAIL:])

    def _healthy(self) -> bool:
        try:
            return ask(self.port, "GET", "/health", timeout=5)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _models(self) -> list[str]:
        try:
            _, answer = ask(self.port, "GET", "/v1/models", timeout=30)
            return [str(model["id"]) for model in json.loads(answer)["data"]]
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise ServerFault(f"the server on port {self.port} does not list its models: {error!r}") from None


def ask(port: int, method: str, path: str, body: Any = None, timeout: float = 60.0) -> tuple[int, bytes]:
    """Status and body of one request to this machine; no proxy, no redirect.

    Raises:
        OSError, http.client.HTTPException: no answer, or one that is too long.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read(LARGEST_ANSWER + 1)
        if len(answer) > LARGEST_ANSWER:
            raise http.client.HTTPException(f"an answer has more than {LARGEST_ANSWER} bytes")
        return response.status, answer
    finally:
        connection.close()


def port_is_free(port: int) -> bool:
    """Whether a server could listen on ``port`` of all addresses now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: connections that end don't count
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def marked_processes(mark: str) -> list[int]:
    """The living processes, of those that we may look into, whose environment has this mark."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):  # empty for a zombie
                found.append(int(entry.name))
    return found


def _until(condition: Callable[[], bool], patience: float) -> bool:
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
