"""The fixed-seq-len part of InferenceX' master files as a matrix.

Their files change; what this reader does not know it skips and says. Two layouts are known, both seen in
``.github/configs/*-master.yaml`` of SemiAnalysisAI/InferenceX:

| layout | where lengths stand | seen |
| --- | --- | --- |
| 1 | ``seq-len-configs`` of an entry | until early 2026 |
| 2 | ``scenarios``, ``fixed-seq-len`` of an entry, beside others | since |
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from epfuse.errors import ConfigError
from epfuse.input_file import read_file
from epfuse.profiling.cpu_budget import CpuBudget
from epfuse.profiling.text import printable
from epfuse.serving.entries import AnyEntry, Entry, EntryKey, MultiNodeEntry, MultiNodeSearch, Search
from epfuse.serving.recipe import READING_SECONDS, MatrixEntry, read_tree, without_tags

LARGEST_FILE = 8 << 20
MOST_VALUES = 200_000
"""Bytes and values of a master file; the largest seen has some 15,000 values."""
LAYOUTS = ("seq-len-configs", "scenarios")

_ENTRY: TypeAdapter[AnyEntry] = TypeAdapter(MatrixEntry)
_KEY: TypeAdapter[str] = TypeAdapter(EntryKey)


@dataclass(frozen=True)
class Imported:
    """What was understood.

    Attributes:
        matrix: key -> entry.
        layouts: which of the two layouts were met, e.g. ``{1, 2}``.
        skipped: what was left out or ignored, one sentence each.
        sha256: of the files' bytes, in their order.
    """

    matrix: dict[str, AnyEntry]
    layouts: frozenset[int]
    skipped: list[str]
    sha256: str


def import_master(paths: Sequence[Path]) -> Imported:
    """Entries of master files, together.

    Raises:
        ConfigError: a file is missing or no YAML mapping, a key stands in two files, a key has ``*`` in it, or nothing
            was understood.
    """
    matrix: dict[str, AnyEntry] = {}
    origin: dict[str, Path] = {}
    layouts: set[int] = set()
    skipped: list[str] = []
    digest = hashlib.sha256()
    with CpuBudget(READING_SECONDS).spend(lambda: "reading master files"):
        for path in paths:
            where = printable(str(path))
            data = read_file(path, "master file", LARGEST_FILE)
            digest.update(data)
            content = read_tree(data, "master file", where, MOST_VALUES).values
            if not isinstance(content, dict):
                raise ConfigError(f"master file {where} is a {type(content).__name__}; it must be a mapping")
            for key, found in content.items():
                if "*" in str(key):
                    raise ConfigError(f"master file {where}: key {printable(str(key))!r} has a *, which selects keys")
                if key in origin:
                    raise ConfigError(f"key {printable(str(key))!r} stands in {origin[key]} and in {where}")
                origin[key] = path
                layout, entry = _entry(str(key), found, skipped)
                layouts |= {layout} if layout else set()
                if entry is not None:
                    matrix[str(key)] = entry
    if not matrix:
        why = f": {skipped[0]}" if skipped else ""
        raise ConfigError(f"no entry of {', '.join(str(path) for path in paths)} was understood{why}")
    return Imported(matrix, frozenset(layouts), skipped, digest.hexdigest())


def _entry(key: str, found: object, skipped: list[str]) -> tuple[int, AnyEntry | None]:
    """The layout and the entry; None, and a sentence in ``skipped``, where it is not one that we know."""
    shown = printable(key)[:100]
    if not isinstance(found, dict):
        skipped.append(f"{shown}: skipped, it is of type {type(found).__name__}")
        return 0, None
    layout, lengths = _lengths(found)
    if not layout:
        skipped.append(f"{shown}: skipped, it has neither {LAYOUTS[0]} nor {LAYOUTS[1]}")
        return 0, None
    if not isinstance(lengths, list) or not lengths:
        skipped.append(f"{shown}: skipped, it has no fixed-seq-len")
        return layout, None
    kind = MultiNodeEntry if found.get("multinode") is True else Entry
    known = _names(kind)
    ignored = sorted(str(name) for name in found if name not in known and name not in LAYOUTS)
    if layout == 2:
        others = [str(name) for name in found["scenarios"] if name != "fixed-seq-len"]
        ignored += [f"scenarios.{name}" for name in others]
    if ignored:
        skipped.append(f"{shown}: ignored {printable(', '.join(ignored))[:200]}")
    search = MultiNodeSearch if kind is MultiNodeEntry else Search
    entry = {name: value for name, value in found.items() if name in known}
    entry["seq-len-configs"] = [_known_search(shown, one, search, skipped) for one in lengths]
    entry["seq-len-configs"] = [one for one in entry["seq-len-configs"] if one is not None]
    try:
        _KEY.validate_python(key)
        return layout, _ENTRY.validate_python(entry)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(printable(str(step)) for step in without_tags(first["loc"])) or "its key"
        skipped.append(f"{shown}: skipped, {place}: {printable(first['msg'])}")
        return layout, None


def _lengths(found: Mapping[str, Any]) -> tuple[int, object]:
    if "seq-len-configs" in found:
        return 1, found["seq-len-configs"]
    scenarios = found.get("scenarios")
    return (2, scenarios.get("fixed-seq-len")) if isinstance(scenarios, dict) else (0, None)


def _known_search(key: str, lengths: object, search: type[Search | MultiNodeSearch], skipped: list[str]) -> object:
    """Lengths without the rows that have a key that we don't know: it may change what the row means."""
    if not isinstance(lengths, dict) or not isinstance(lengths.get("search-space"), list):
        return lengths
    known = _names(search)
    rows = []
    for row in lengths["search-space"]:
        unknown = sorted(str(name) for name in row if name not in known) if isinstance(row, dict) else []
        if unknown:
            what = printable(", ".join(unknown))[:200]
            skipped.append(f"{key}: skipped a row of {lengths.get('isl')}/{lengths.get('osl')} that has {what}")
        else:
            rows.append(row)
    kept = {name: value for name, value in lengths.items() if name in ("isl", "osl")}
    return kept | {"search-space": rows} if rows else None


def _names(kind: type[Entry | MultiNodeEntry | Search | MultiNodeSearch]) -> set[str]:
    return {field.alias or name for name, field in kind.model_fields.items()}
