"""The claim of a point: a folder that exactly one process makes, and that only its revocation takes away.

``running`` appears in one step with the attempt's key and the process's own token in it: it is made under another name
and renamed, and a rename onto a folder with something in it fails. So there is no moment in which it is there without a
holder, and a second copy of the same job, which has the same key, is no holder. Revocation is a rename away.

The end of a point is renamed out of the claim, from a file that was made with it. After a revocation there is no such
file any more, so a job that lost its claim can't write an end, not even between a look and the rename.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epfuse.errors import ConfigError, EpfuseError
from epfuse.input_file import read_object
from epfuse.report.write import sync

RUNNING = "running"
KEY = "key"
HOLDER = "holder.json"
PHASE = "phase"
REVOKED = "revoked"
LARGEST_HOLDER = 1 << 16
RESERVE = 1 << 18
"""Bytes that a claim sets aside for the end, so that it can be told on a disk that has become full."""


class Revoked(EpfuseError):
    """The claim is another's, or nobody's: whatever this job measured counts for nothing.

    Fix: none: the job that has the claim goes on.
    """


@dataclass(frozen=True)
class Holder:
    """Who holds a point.

    Attributes:
        key: of the attempt.
        token: of the process; no two processes have the same.
        host: where it runs.
        pid: its number there.
    """

    key: str
    token: str
    host: str
    pid: int


@dataclass(frozen=True)
class Claim:
    """This process's claim of a point.

    Attributes:
        point: the point's folder.
        holder: this process.
    """

    point: Path
    holder: Holder

    @classmethod
    def take(cls, point: Path, key: str) -> Claim | None:
        """Claim a point; None if somebody holds it, be it another copy of the same job.

        Args:
            point: the point's folder; it exists.
            key: of the attempt.

        Raises:
            OSError: the folder can't be written.
        """
        holder = Holder(key, secrets.token_hex(16), socket.gethostname(), os.getpid())
        made = point / f".{RUNNING}.{holder.token}"
        made.mkdir()
        try:
            _write_synced(made / KEY, key.encode())
            _write_synced(made / HOLDER, json.dumps(vars(holder)).encode())
            _write_synced(made / _end_of(holder), bytes(RESERVE))
            sync(made)
            os.rename(made, point / RUNNING)
        except OSError as error:
            # a file system over a network may have done it, lost the answer and asked again
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
        sync(point)
        claim = cls(point, holder)
        return claim if claim.held else None

    @property
    def held(self) -> bool:
        """Whether the claim is still this process's."""
        return holder_of(self.point) == self.holder

    def note(self, phase: str) -> None:
        """Say in the claim what is being done, for who looks from outside: a word of `journal.PointState`."""
        if self.held:  # lost in this moment, the next attempt's word is wrong until its next one
            (self.point / RUNNING / PHASE).write_text(phase)

    def publish(self, data: bytes, path: Path) -> None:
        """Write a file, once and whole, if the claim is still held in that very moment.

        Args:
            data: its content.
            path: on the file system of the point's folder.

        Raises:
            Revoked: the claim is not held; nothing was written.
            OSError: it can't be written.
        """
        made = self.point / RUNNING / _end_of(self.holder)
        try:
            with made.open("r+b") as file:  # never made here: it would lie in the next attempt's claim
                file.write(data)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
            os.rename(made, path)
        except FileNotFoundError:
            raise Revoked(f"attempt {self.holder.key} no longer holds the point") from None
        sync(path.parent)


def holder_of(point: Path) -> Holder | None:
    """Who holds a point; None if nobody does.

    Raises:
        ConfigError: ``running`` is there and does not say who holds it.
    """
    file = point / RUNNING / HOLDER
    if not file.exists():  # a revocation in between is one
        if (point / RUNNING).exists() and not file.exists() and (point / RUNNING).exists():
            raise ConfigError(f"{point / RUNNING} has no {HOLDER}: no job of epfuse made it; remove it by hand")
        return None
    try:
        return _holder(read_object(file, "claim", LARGEST_HOLDER), file)
    except ConfigError:
        if not file.exists():
            return None
        raise


def revoke(point: Path, key: str) -> bool:
    """Take the claim of attempt ``key`` away, in one step; the next attempt may claim the point afterwards.

    Args:
        point: the point's folder.
        key: of the attempt whose claim it is.

    Returns:
        Whether it held the point; False if nobody, or another attempt, does.

    Raises:
        ConfigError: ``running`` does not say who holds it.
        OSError: the folder can't be written.
    """
    holder = holder_of(point)
    if holder is None or holder.key != key:
        return False
    graves = point / REVOKED
    graves.mkdir(exist_ok=True)
    grave = graves / f"{holder.token}"
    try:
        os.rename(point / RUNNING, grave)
    except FileNotFoundError:
        return False
    sync(graves)
    sync(point)
    return True


def _end_of(holder: Holder) -> str:
    return f"end-{holder.token}"


def _holder(content: dict[str, Any], file: Path) -> Holder:
    kinds = {"key": str, "token": str, "host": str, "pid": int}
    if content.keys() != kinds.keys() or any(type(content[name]) is not kind for name, kind in kinds.items()):
        raise ConfigError(f"claim {file} must have key, token, host and pid, and nothing else")
    return Holder(**content)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
