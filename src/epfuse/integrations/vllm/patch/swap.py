"""Replace one file in one step: before a crash it is the old one, after it the new one, never a part of either."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from epfuse.errors import ConfigError
from epfuse.input_file import read_file
from epfuse.report.write import sync


def temporary(path: Path) -> Path:
    """Where the next content of ``path`` is prepared; always the same, so that a leftover is found."""
    return path.with_name(f".{path.name}.epfuse")


def kept_link(path: Path) -> Path:
    """Where the symbolic link that was at ``path`` waits until it is brought back."""
    return path.with_name(f".{path.name}.epfuse-link")


def swap(path: Path, content: bytes) -> None:
    """Write, reach the disk, rename; the file's mode stays."""
    prepared = temporary(path)
    try:
        with prepared.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(prepared, path.stat().st_mode & 0o7777)
        os.replace(prepared, path)
    except OSError:  # a full disk, say
        with suppress(OSError):
            discard(prepared)
        raise
    sync(path.parent)


def keep_link(path: Path) -> None:
    """Before a `swap` that `bring_back` will undo: remember the link if ``path`` is one.

    Installers may make a file a link into a cache that other environments share. What it points to is never written: a
    file takes the link's place.
    """
    discard(kept_link(path))  # of an installation that was here before
    if path.is_symlink():
        os.symlink(os.readlink(path), kept_link(path))
        sync(path.parent)


def bring_back(path: Path, content: bytes) -> None:
    """Make ``path`` what it was before: the link that was kept if it leads to ``content``, else a file with it."""
    link = kept_link(path)
    if link.is_symlink() and _holds(link, content):
        os.replace(link, path)
        sync(path.parent)
    else:
        swap(path, content)
        discard(link)


def _holds(file: Path, content: bytes) -> bool:
    try:
        return read_file(file, "vLLM's file") == content
    except ConfigError:  # what it points to has gone
        return False


def discard(path: Path) -> None:
    """Remove a file if it is there, on the disk too."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    sync(path.parent)
