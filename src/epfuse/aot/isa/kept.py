"""Results on disk, so that a long run that is ended goes on where it was."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

import epfuse
from epfuse.errors import ConfigError
from epfuse.input_file import read_file
from epfuse.report.write import write_atomic
from epfuse.verify.record import versions

T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """A folder of results, a file each. Those of other code, of other versions or of another seed are not looked at.

    Attributes:
        folder: where; None keeps nothing.
        run: what the results are of, as `run_of` says it.
    """

    folder: Path | None
    run: str

    def load(self, name: str, kind: type[T]) -> T | None:
        """The result of that name, or None.

        Raises:
            ConfigError: the file is there and holds something else.
        """
        if self.folder is None or not (path := self._path(name)).exists():
            return None
        try:
            return TypeAdapter(kind).validate_json(read_file(path, "kept result"))
        except ValidationError as error:
            why = error.errors(include_url=False)[0]["msg"]
            raise ConfigError(f"kept result {path} is none ({why}); remove it") from None

    def save(self, name: str, kind: type[T], result: T) -> T:
        """Keep a result, and give it back."""
        if self.folder is not None:
            write_atomic(self._path(name), TypeAdapter(kind).dump_json(result))
        return result

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(f'{self.run} {name}'.encode()).hexdigest()[:32]}.json"


def run_of(seed: int) -> str:
    """A digest of this package's code, the versions under it and a seed."""
    total = hashlib.sha256(json.dumps([versions(), seed]).encode())
    root = Path(epfuse.__file__).parent
    for file in sorted(root.rglob("*.py")):
        total.update(file.relative_to(root).as_posix().encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
