"""Tables on disk: read with checks, written atomically under a lock."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from textwrap import indent
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from epfuse.arguments import checks_enums
from epfuse.errors import ConfigError, first_fault
from epfuse.families.family import Stage
from epfuse.input_file import read_file
from epfuse.measured.schema import Measurement, TileTable
from epfuse.report.folder_lock import locked
from epfuse.report.write import remove_leftovers, write_atomic
from epfuse.target import Target

TABLES = Path(__file__).parent / "tables"
"""The tables that calls read."""
JOURNAL = "merging.json"
LARGEST_TABLE = 64 << 20
"""Bytes; the largest that ships has some 50 KiB."""


@functools.cache
def shipped(target: Target, stage: Stage) -> TileTable:
    """The table that calls read; one without measurements where there is no file. Read once a process."""
    return read_table(TABLES, target, stage)


@checks_enums
def table_path(folder: Path, target: Target, stage: Stage) -> Path:
    """Where a table lies in a folder of tables."""
    return folder / target.value / f"{stage.value}.json"


@checks_enums
def read_table(folder: Path, target: Target, stage: Stage) -> TileTable:
    """A table, checked; an empty one where there is no file.

    Raises:
        ConfigError: the file can't be read or is not a table of this target and stage; the message says where it goes
            wrong.
    """
    journal = _unfinished(folder, target)
    if stage in journal:
        return journal[stage]
    path = table_path(folder, target, stage)
    if not os.path.lexists(path):
        return TileTable(target=target, stage=stage)
    table = _parse(path, TileTable)
    _check(path, table, target, stage)
    return table


@checks_enums
def check_tables(folder: Path, target: Target) -> None:
    """Read both tables, so that a damaged one is found before anything is measured.

    Raises:
        ConfigError: as `read_table`.
    """
    for stage in Stage:
        read_table(folder, target, stage)


@checks_enums
def merge(folder: Path, target: Target, measurements: dict[Stage, Measurement]) -> None:
    """Put measurements of both stages into a folder's tables; several processes may do so at once.

    A process that is killed at any moment loses nothing of what was there: the new tables are written to a journal
    first, and whoever reads or merges next goes on from it.

    Args:
        folder: made if it is not there.
        target: where they were measured.
        measurements: by stage.

    Raises:
        ConfigError: a table in the folder is damaged.
        OSError: the folder can't be written; nothing of what was there is lost.
    """
    place = folder / target.value
    place.mkdir(parents=True, exist_ok=True)
    with locked(place):
        tables = _unfinished(folder, target)
        for stage, measurement in measurements.items():
            tables[stage] = read_table(folder, target, stage).merged(measurement)
        journal = place / JOURNAL
        write_atomic(journal, _Journal(tables=tuple(tables.values())).model_dump_json())
        for stage, table in tables.items():
            remove_leftovers(table_path(folder, target, stage))
            write_atomic(table_path(folder, target, stage), _text(table))
        remove_leftovers(journal)
        journal.unlink()


class _Journal(BaseModel):
    """The tables that a merge is about to write."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tables: tuple[TileTable, ...]


def _unfinished(folder: Path, target: Target) -> dict[Stage, TileTable]:
    """What a merge that was killed, or is at work now, writes; empty without one."""
    path = folder / target.value / JOURNAL
    if not path.exists():
        return {}
    try:
        tables = _parse(path, _Journal).tables
    except ConfigError:
        if path.exists():
            raise
        return {}  # that merge is done
    for table in tables:
        _check(path, table, target, table.stage)
    return {table.stage: table for table in tables}


T = TypeVar("T", bound=BaseModel)


def _parse(path: Path, kind: type[T]) -> T:
    data = read_file(path, "tuned table", LARGEST_TABLE)
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        place, fault = first_fault(error, "the top")
        raise ConfigError(f"tuned table {path} is wrong at {place}: {fault}") from None


def _check(path: Path, table: TileTable, target: Target, stage: Stage) -> None:
    if (table.target, table.stage) != (target, stage):
        raise ConfigError(
            f"tuned table {path} is of {table.target.value}, {table.stage.value}; it must be of"
            f" {target.value}, {stage.value}"
        )


def _text(table: TileTable) -> str:
    """A row a line, so that a diff shows which tiles changed."""
    values = table.model_dump(mode="json")
    measurements = []
    for measurement in values.pop("measurements"):
        rows = ",\n".join(f"  {json.dumps(row)}" for row in measurement.pop("rows"))
        measurements.append(f'{json.dumps(measurement, indent=2)[:-2]},\n  "rows": [\n{indent(rows, "  ")}\n  ]\n}}')
    listed = indent(",\n".join(measurements), "    ")
    return f'{json.dumps(values, indent=2)[:-2]},\n  "measurements": [\n{listed}\n  ]\n}}\n'
