"""An installed vLLM, and what its own wheel says its files are."""

from __future__ import annotations

import base64
import csv
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

from epfuse.errors import ConfigError
from epfuse.integrations.vllm.releases import DISTRIBUTIONS, TESTED


@dataclass(frozen=True)
class Site:
    """One installed vLLM.

    Attributes:
        root: the directory that ``vllm/`` is in.
        metadata: its ``.dist-info`` directory.
        release: its version, without a local part.
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
        """One process at a time; the lock is on the metadata directory and leaves no file."""
        import fcntl  # here, so that other commands' help works where there is none
        import os

        descriptor = os.open(self.metadata, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def record_hash(content: bytes) -> str:
    """SHA-256 in RECORD's spelling: urlsafe base64 without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def find_site(root: Path | None = None) -> Site:
    """The vLLM in ``root``, or the one that this interpreter would import.

    Raises:
        ConfigError: there is none, it has no RECORD, or its release was never tested.
    """
    found = _distribution(root)
    metadata = Path(str(getattr(found, "_path", "")))
    record = metadata / "RECORD"
    if not record.is_file():
        raise ConfigError(f"{metadata} has no RECORD; only a vLLM that was installed from a wheel can be patched")
    release = found.version.partition("+")[0]
    if release not in TESTED:
        raise ConfigError(f"vLLM in {metadata.parent} is {release}; the patch is for {', '.join(TESTED)}")
    recorded = {}
    with record.open(newline="") as lines:
        for row in csv.reader(lines):
            if len(row) > 1 and row[1].startswith("sha256="):
                recorded[row[0]] = row[1].removeprefix("sha256=")
    return Site(metadata.parent, metadata, release, recorded)


def _distribution(root: Path | None) -> Distribution:
    if root is not None:
        for found in distributions(path=[str(root)]):
            if found.name in DISTRIBUTIONS:
                return found
        raise ConfigError(f"no vLLM is installed in {root}")
    for name in DISTRIBUTIONS:
        try:
            return distribution(name)
        except PackageNotFoundError:
            continue
    raise ConfigError("no vLLM is installed; name the directory that has it with --site")
