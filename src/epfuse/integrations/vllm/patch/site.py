"""An installed vLLM, and what its own wheel says its files are."""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.parser import BytesHeaderParser
from pathlib import Path

from epfuse.errors import ConfigError
from epfuse.input_file import read_file
from epfuse.integrations.vllm.releases import DISTRIBUTIONS
from epfuse.report.folder_lock import locked


@dataclass(frozen=True)
class Site:
    """One installed vLLM.

    Attributes:
        root: the directory that ``vllm/`` is in.
        metadata: its ``.dist-info`` directory.
        release: its version, without a local part; ``unknown`` where its metadata does not say it.
        recorded: path relative to root -> SHA-256 as RECORD writes it.
    """

    root: Path
    metadata: Path
    release: str
    recorded: dict[str, str]

    def is_recorded(self, path: str, content: bytes) -> bool:
        """Whether these are the bytes that the wheel installed at ``path``."""
        return self.recorded.get(path) == record_hash(content)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time; the lock is on the metadata directory and leaves no file.

        Raises:
            ConfigError: another process holds it for too long, or a file can't be read or written.
        """
        try:
            with locked(self.metadata):
                yield
        except OSError as error:
            place = error.filename2 or error.filename or self.root
            raise ConfigError(
                f"{place} can't be read or replaced: {error.strerror or error}; vLLM's files are patched by who may"
                " write them"
            ) from None


def record_hash(content: bytes) -> str:
    """SHA-256 in RECORD's spelling: urlsafe base64 without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def find_site(root: Path | None = None) -> Site:
    """The vLLM in ``root``, or the first one on this interpreter's path.

    Raises:
        ConfigError: there is none, there are several, or its RECORD is not there or none.
    """
    metadata = _metadata(root)
    recorded = {}
    content = read_file(metadata / "RECORD", "vLLM's RECORD").decode("utf-8", "surrogateescape")  # names are bytes
    try:
        for row in csv.reader(content.splitlines()):
            if len(row) > 1 and row[1].startswith("sha256="):
                recorded[row[0]] = row[1].removeprefix("sha256=")
    except csv.Error as error:
        raise ConfigError(f"{metadata / 'RECORD'} is no RECORD: {error}; install vLLM again") from None
    return Site(metadata.parent, metadata, _release(metadata), recorded)


def _metadata(root: Path | None) -> Path:
    """The ``.dist-info`` directory of the one vLLM that was installed from a wheel."""
    for place in [root] if root is not None else [Path(entry or os.curdir) for entry in sys.path]:
        found = [each for each in _dist_infos(place) if os.path.lexists(each / "RECORD")]
        if len(found) > 1:
            names = " and ".join(each.name for each in found)
            raise ConfigError(f"{place} has {names}; which of them is installed can't be known: remove the other")
        if found:
            return found[0]
        left = _dist_infos(place)
        if left:
            raise ConfigError(f"{left[0]} has no RECORD; only a vLLM that was installed from a wheel can be patched")
    where = "" if root is None else f" in {root}"
    raise ConfigError(f"no vLLM is installed{where}; name the directory that has it with --site")


def _dist_infos(place: Path) -> list[Path]:
    prefixes = tuple(f"{name.replace('-', '_')}-" for name in DISTRIBUTIONS)
    try:
        entries = sorted(os.listdir(place))
    except (OSError, ValueError):  # no directory, or a name that is none
        return []
    return [place / entry for entry in entries if entry.startswith(prefixes) and entry.endswith(".dist-info")]


def _release(metadata: Path) -> str:
    try:
        found = BytesHeaderParser().parsebytes(read_file(metadata / "METADATA", "vLLM's METADATA"))["Version"]
    except ConfigError:
        found = None
    return str(found).partition("+")[0].strip() if found else "unknown"
