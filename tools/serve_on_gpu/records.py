"""The records of all parts: read back with care, and put together."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from epfuse.errors import ConfigError
from epfuse.input_file import read_object

FORMAT = "epfuse-serve-on-gpu-1"
KEYS = {"part": str, "label": str, "number": int, "arm": str, "written": str, "complete": bool}
"""What every record has, beside its part's own."""


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file.

    Raises:
        ConfigError: it can't be read, or is no such file.
    """
    content = read_object(path, "record")
    if content.get("format") != FORMAT:
        raise ConfigError(f"record {path} has format {content.get('format')!r}; needed is {FORMAT!r}")
    records = content.get("records")
    if not isinstance(records, list):
        raise ConfigError(f"record {path} has no list of records")
    for record in records:
        for key, kind in KEYS.items():
            if not isinstance(record, dict) or not isinstance(record.get(key), kind):
                raise ConfigError(f"a record of {path} has no {key} of type {kind.__name__}")
    return records


def merge(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The records of files, and of all such files in folders; of one that occurs twice the complete or later one.

    Raises:
        ConfigError: a file is no such file, or there is none.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    found: dict[tuple[str, str, int, str], dict[str, Any]] = {}
    for record in (record for file in files for record in read_records(file)):
        key = (record["part"], record["label"], record["number"], record["arm"])
        old = found.get(key)
        if old is None or (record["complete"], record["written"]) >= (old["complete"], old["written"]):
            found[key] = record
    if not found:
        raise ConfigError("there is no record in what was given")
    return [found[key] for key in sorted(found)]


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """What the listeners of a server's processes wrote, in the order of time; a torn line at the end is left out.

    Raises:
        ConfigError: a line is not the listener's.
    """
    found = []
    for file in sorted(folder.glob("compiles-*.jsonl")):
        text = file.read_text(encoding="utf-8")
        for line in text[: text.rfind("\n") + 1].splitlines():
            try:
                entry = json.loads(line)
                found.append(
                    {
                        "time": float(entry["time"]),
                        "ours": bool(entry["ours"]),
                        "hit": bool(entry["hit"]),
                        "kernel": str(entry["kernel"]),
                        "us": int(entry["us"]),
                    }
                )
            except (ValueError, LookupError, TypeError):
                raise ConfigError(f"{file} has a line that no listener wrote: {line[:80]!r}") from None
    return sorted(found, key=lambda entry: entry["time"])
