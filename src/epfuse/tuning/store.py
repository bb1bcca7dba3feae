"""Tables on disk: read with checks, written atomically under a lock."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

from pydantic import ValidationError

from epfuse.errors import ConfigError, first_fault
from epfuse.target import Target
from epfuse.tuning.schema import Measurement, Stage, Table

TABLES = Path(__file__).parent / "tables"
"""The tables that calls read."""


@functools.cache
def shipped(target: Target, stage: Stage) -> Table:
    """The table that calls read; one without measurements where there is no file. Read once a process."""
    return read_table(TABLES, target, stage)


def table_path(folder: Path, target: Target, stage: Stage) -> Path:
    """Where a table lies in a folder of tables."""
    return folder / target.value / f"{stage.value}.json"


def read_table(folder: Path, target: Target, stage: Stage) -> Table:
    """A table, checked; an empty one where there is no file.

    Raises:
        ConfigError: the file is not a table of this target and stage; the message says where it goes wrong.
    """
    path = table_path(folder, target, stage)
    try:
        text = path.read_text()
    except FileNotFoundError:
        return Table(target=target, stage=stage)
    try:
        table = Table.model_validate_json(text)
    except ValidationError as error:
        place, fault = first_fault(error, "the top")
        raise ConfigError(f"tuned table {path} is wrong at {place}: {fault}") from None
    if (table.target, table.stage) != (target, stage):
        raise ConfigError(
            f"tuned table {path} is of {table.target.value}, {table.stage.value}; it must be of"
            f" {target.value}, {stage.value}"
        )
    return table


def merge(folder: Path, target: Target, measurements: dict[Stage, Measurement]) -> None:
    """Put measurements of both stages into a folder's tables; several processes may do so at once.

    Args:
        folder: made if it is not there.
        target: where they were measured.
        measurements: by stage.
    """
    place = folder / target.value
    place.mkdir(parents=True, exist_ok=True)
    with _locked(place):
        for stage, measurement in measurements.items():
            table = read_table(folder, target, stage).merged(measurement)
            _replace(table_path(folder, target, stage), _text(table))


def _text(table: Table) -> str:
    """A row a line, so that a diff shows which tiles changed."""
    values = table.model_dump(mode="json")
    measurements = []
    for measurement in values.pop("measurements"):
        rows = ",\n".join(f"  {json.dumps(row)}" for row in measurement.pop("rows"))
        measurements.append(f'{json.dumps(measurement, indent=2)[:-2]},\n  "rows": [\n{indent(rows, "  ")}\n  ]\n}}')
    listed = indent(",\n".join(measurements), "    ")
    return f'{json.dumps(values, indent=2)[:-2]},\n  "measurements": [\n{listed}\n  ]\n}}\n'


def _replace(path: Path, text: str) -> None:
    """All of it or nothing: a reader never sees half a table."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; it ends with the process, so none is ever stale, and there is no file to leave behind."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
