"""A bundle: a layer's kernels, compiled ahead of time into a folder that goes into a container image.

`epfuse warmup` makes one, EPFUSE_KERNELS names it. It holds Triton's own files by Triton's keys, and a manifest of what
they were made with and of their hashes. What was made with something else is not used, and the log says why.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import re
import sysconfig
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from epfuse.environment import environment
from epfuse.errors import ConfigError, first_fault
from epfuse.input_file import read_object
from epfuse.report.write import write_atomic

log: logging.Logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
KERNELS = "kernels"
_NAME = re.compile(r"[A-Za-z0-9_.\-]+/[A-Za-z0-9_.\-]+")


@dataclass(frozen=True)
class MadeWith:
    """What compiled kernels depend on, besides the GPU that they are for.

    Attributes:
        triton: its version.
        sources: hash of epfuse's kernels.
        abi: CPython's, which launchers are compiled for.
    """

    triton: str
    sources: str
    abi: str

    @classmethod
    def here(cls) -> MadeWith:
        """This process's."""
        stages = Path(__file__).parent / "stages"
        digest = hashlib.sha256()
        for path in sorted(stages.rglob("*.py")):
            digest.update(path.relative_to(stages).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
        triton = importlib.metadata.version("triton")
        return cls(triton, digest.hexdigest(), sysconfig.get_config_var("SOABI") or "unknown")


class Manifest(BaseModel):
    """The manifest's content.

    Attributes:
        schema_version: 1.
        target: GPU.
        product: whose tables chose the tiles.
        triton, sources, abi: see `MadeWith`.
        layers: the layers whose kernels are there, a sentence each.
        max_tokens: the largest T.
        files: ``KEY/NAME`` -> sha256.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    schema_version: int = 1
    target: str
    product: str
    triton: str
    sources: str
    abi: str
    layers: list[str]
    max_tokens: int
    files: dict[str, str]


@dataclass(frozen=True)
class Bundle:
    """A bundle that this process can use.

    Attributes:
        root: its folder.
        manifest: what it says.
    """

    root: Path
    manifest: Manifest
    _checked: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path) -> Bundle:
        """The bundle in a folder.

        Raises:
            ConfigError: there is none, its manifest is none, or it was made with something else than is here.
        """
        content = read_object(root / MANIFEST, "manifest")
        try:
            manifest = Manifest.model_validate(content)
        except ValidationError as error:
            where, what = first_fault(error, "the manifest")
            raise ConfigError(f"manifest {root / MANIFEST} is none: {where}: {what}") from None
        if manifest.schema_version != 1 or not all(map(_NAME.fullmatch, manifest.files)):
            raise ConfigError(f"manifest {root / MANIFEST} is of another version of epfuse, or names files elsewhere")
        for name, ours in asdict(MadeWith.here()).items():
            theirs = getattr(manifest, name)
            if theirs != ours:
                raise ConfigError(
                    f"the kernels in {root} were compiled with {name} {theirs}, and here is {ours}; make them again"
                    " ('epfuse warmup')"
                )
        return cls(root, manifest)

    @classmethod
    def write(cls, root: Path, target: str, product: str, layers: list[str], max_tokens: int) -> Bundle:
        """Make a bundle of what lies in its folder of kernels.

        Raises:
            OSError: the folder can't be read or written.
        """
        kernels = root / KERNELS
        files = {
            path.relative_to(kernels).as_posix(): hash_of(path)
            for path in sorted(kernels.glob("*/*"))
            if path.is_file() and _NAME.fullmatch(path.relative_to(kernels).as_posix())
        }
        made = asdict(MadeWith.here())
        manifest = Manifest(target=target, product=product, layers=layers, max_tokens=max_tokens, files=files, **made)
        write_atomic(root / MANIFEST, manifest.model_dump_json(indent=1))
        return cls(root, manifest)

    def file(self, key: str, name: str) -> Path | None:
        """A file of a kernel, if it is there and what the manifest says; its hash is taken once."""
        what = f"{key}/{name}"
        known = self.manifest.files.get(what)
        if known is None:
            return None
        path = self.root / KERNELS / key / name
        if what not in self._checked:
            try:
                self._checked[what] = hash_of(path) == known
            except OSError:
                self._checked[what] = False
            if not self._checked[what]:
                log.warning("%s is not what the manifest says, and is not used", path)
        return path if self._checked[what] else None


def hash_of(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def bundle() -> Bundle | None:
    """The bundle that EPFUSE_KERNELS names; None, with a warning, if it can't be used."""
    named = environment().kernels
    if named is None:
        return None
    try:
        return Bundle.read(Path(named))
    except ConfigError as error:
        log.warning("EPFUSE_KERNELS=%s is not used: %s", named, error)
        return None
