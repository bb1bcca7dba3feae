"""The package's one writer of files: a reader sees the old file or the new one, never half of it.

What is no regular file is written through, as a shell's ``>`` would: a FIFO, a terminal, ``/dev/stdout``,
``/dev/null``. Symbolic links are followed; the link stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from epfuse.errors import ConfigError

NO_FOLDER_SYNC = {errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOTSUP}
"""What file systems answer that can't sync a folder, and folders that may be written but not read."""


def write_atomic(path: Path, data: str | bytes) -> Path:
    """Write ``data`` to ``path`` through a temporary file beside it: written, synced to disk, renamed over ``path``.

    Args:
        path: parents are not created; an existing file is replaced and its permissions and, as far as that is allowed,
            its owner are kept. What is no regular file is written through and stays what it is.
        data: text goes out as UTF-8; what UTF-8 can't say (a lone surrogate, of a file's name) as an escape.

    Returns:
        ``path``.

    Raises:
        OSError: ``path`` is a folder, a block device, a FIFO that nobody reads or a file that may not be written, its
            folder is missing or not writable, or the disk is full; a file is then as it was.
    """
    with replacing(path) as file:
        file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """As `write_atomic`, for content that is not in memory at once: a file to write, in place when the block ends.

    An exception in the block leaves ``path`` as it was (what was written through is gone).
    """
    target = _regular(path)
    if target is None:
        with _through(path) as file:
            yield file
        return
    old = _stat(target)
    if old is not None and not os.access(target, os.W_OK):  # a rename would not ask
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    temporary, handle = _temporary(target, 0o666 if old is None else 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if old is not None:
                with contextlib.suppress(PermissionError):
                    os.fchown(file.fileno(), old.st_uid, old.st_gid)
                os.fchmod(file.fileno(), old.st_mode & 0o777)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def check_output(path: Path, option: str) -> None:
    """Refuse a file that `write_atomic` could not write, before minutes of work; changes nothing.

    Args:
        path: where a result is to go.
        option: what it was given as, for the message.

    Raises:
        ConfigError: the folder is missing or not writable, or ``path`` is a folder or may not be written.
    """
    try:
        target = _regular(path)
        if target is None:
            _refuse_folders_and_disks(path)
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        if not target.parent.is_dir():
            folder = target.parent if path.is_symlink() else path.parent
            raise ConfigError(f"{option} is {str(path)!r}: the folder {folder} does not exist; make it first")
        if _stat(target) is not None and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        _probe(target)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{option} is {str(path)!r}, which can't be written: {reason}") from None


def check_output_folder(folder: Path, option: str) -> None:
    """Refuse a folder that could not be made, or written into; makes nothing.

    Raises:
        ConfigError: it, or the nearest of its parents that exists, is no folder or not writable.
    """
    try:
        there = folder.absolute()
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is no folder")
        _probe(there / "x")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{option} is {str(folder)!r}, which can't be written: {reason}") from None


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of ``path`` whose writers were killed; only for who keeps all other writers out."""
    for left in path.parent.glob(f".{_stem(path)}.*"):
        left.unlink(missing_ok=True)


def _regular(path: Path) -> Path | None:
    """The file that ``path`` leads to, or the free name; None for what is to be written through."""
    found = _stat(path)
    target = Path(os.path.realpath(path))
    if found is None:
        return target
    if not stat.S_ISREG(found.st_mode) or _standard_stream(found) is not None:
        return None
    there = _stat(target)
    # /proc/self/fd/N of a file whose name is gone, or another's by now
    return target if there is not None and os.path.samestat(found, there) else None


@contextlib.contextmanager
def _through(path: Path) -> Iterator[BinaryIO]:
    _refuse_folders_and_disks(path)
    stream = _standard_stream(path.stat())
    if stream is not None:  # a redirected stdout, written where it stands: opened anew it would begin at 0
        handle = os.dup(stream)
    else:  # O_NONBLOCK: a FIFO that nobody reads is an error, no wait without end
        handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        os.set_blocking(handle, True)
    with os.fdopen(handle, "wb") as file:
        yield file


def _refuse_folders_and_disks(path: Path) -> None:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if stat.S_ISBLK(mode):
        raise OSError(errno.EINVAL, "a block device takes no report", str(path))


def _standard_stream(found: os.stat_result) -> int | None:
    """Whether a file is this process' stdout or stderr: its descriptor, flushed."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):
            if os.path.samestat(found, os.fstat(number)):
                if stream is not None:
                    stream.flush()
                return number
    return None


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _stem(path: Path) -> str:
    return path.name[:40]  # the temporary name must not be longer than a file system takes


def _temporary(target: Path, mode: int) -> tuple[Path, int]:
    """A new file beside ``target``; the umask and the folder's default ACL apply to ``mode``."""
    temporary = target.parent / f".{_stem(target)}.{secrets.token_hex(8)}"
    return temporary, os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)


def _probe(target: Path) -> None:
    """Make the temporary file and remove it: only trying finds read-only mounts, quotas and what root may not do."""
    if len(os.fsencode(target.name)) > os.pathconf(target.parent, "PC_NAME_MAX"):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    temporary, handle = _temporary(target, 0o600)
    os.close(handle)
    temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the file system can."""
    try:
        sync(folder)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise


def sync(path: Path) -> None:
    """Let a file's bytes, or the renames and removals in a folder, reach the disk.

    Raises:
        OSError: they can't.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
