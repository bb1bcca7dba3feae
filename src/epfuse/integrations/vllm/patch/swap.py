"""Replace one file in one step: before a crash it is the old one, after it the new one, never a part of either."""

from __future__ import annotations

import os
from pathlib import Path


def temporary(path: Path) -> Path:
    """Where the next content of ``path`` is prepared; always the same, so that a leftover is found."""
    return path.with_name(f".{path.name}.epfuse")


def swap(path: Path, content: bytes) -> None:
    """Write, reach the disk, rename; the file's mode stays."""
    prepared = temporary(path)
    with prepared.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        os.chmod(prepared, path.stat().st_mode & 0o7777)
    os.replace(prepared, path)
    sync_directory(path.parent)


def discard(path: Path) -> None:
    """Remove a file if it is there, on the disk too."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Let renames and removals in ``path`` reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
