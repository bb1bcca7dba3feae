"""One dispatcher a run: a lock that its death opens, and that says who holds it.

On one machine the kernel's lock is the truth, whatever the file says: it goes with the process. Between machines that
share a folder it may not reach, so a file that names another machine is believed until somebody says otherwise.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from epfuse.errors import ConfigError

LARGEST = 1 << 12


class RunLocked(ConfigError):
    """Another dispatcher has the run.

    Fix: wait for the other dispatcher, or end it; ``epfuse serve status`` only reads, and always works.
    """


@dataclass(frozen=True)
class Owner:
    """Who holds a run's lock.

    Attributes:
        host: the machine's name.
        machine: its id, for names such as localhost occur twice.
        pid: the process there.
        token: the lock's, no two have the same.
    """

    host: str
    machine: str
    pid: int
    token: str

    @property
    def is_here(self) -> bool:
        return (self.host, self.machine) == (socket.gethostname(), _machine())

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class RunLock:
    """The right to write a run's journal.

    Attributes:
        stale: whose lock was found, if its holder is dead.
    """

    def __init__(self, path: Path, take_over: bool = False) -> None:
        """Take it.

        Args:
            path: of the lock's file.
            take_over: from another machine's dispatcher, of which the caller knows that it is dead.

        Raises:
            RunLocked: another dispatcher has it; the message says which one and what to do.
            OSError: the folder can't be written.
        """
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunLocked(f"{path.parent} is being run by {read_owner(path) or 'another dispatcher'}") from None
            self.stale: Owner | None = read_owner(path)
            if self.stale is not None and not self.stale.is_here and not take_over:
                raise RunLocked(
                    f"{path.parent} is being run by {self.stale}, which can't be seen from {socket.gethostname()}; "
                    "if that process is dead, give --take-over"
                )
            self._me = Owner(socket.gethostname(), _machine(), os.getpid(), secrets.token_hex(8))
            self._write(json.dumps(asdict(self._me)))
        except BaseException:
            os.close(self._file)
            raise

    def check(self) -> None:
        """Refuse to go on where another machine's dispatcher took the run over.

        Raises:
            RunLocked: it did.
        """
        if (now := read_owner(self.path)) != self._me:
            raise RunLocked(f"{self.path.parent} was taken over by {now or 'somebody who removed its lock'}")

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if read_owner(self.path) == self._me:
            with suppress(OSError):  # a full disk: then it is stale, which the next one sees
                self._write("")
        os.close(self._file)

    def _write(self, text: str) -> None:
        """In place: a renamed file would have another lock."""
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text.encode(), 0)
        os.fsync(self._file)


def read_owner(path: Path) -> Owner | None:
    """Whom a lock's file names; None if nobody, or if it is torn: its writer died while it took the lock."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(LARGEST))
        owner = Owner(**found)
    except (OSError, ValueError, TypeError):
        return None
    return owner if isinstance(owner.pid, int) and isinstance(owner.host, str) else None


def _machine() -> str:
    """The same after a restart: a dispatcher of before it is dead."""
    with suppress(OSError):
        return Path("/etc/machine-id").read_text().strip()
    return ""
