"""Files from outside, read within limits of size and time, whatever their name leads to."""

from __future__ import annotations

import json
import math
import os
import select
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from epfuse.errors import ConfigError

LARGEST_INPUT = 16 << 20
"""Bytes of a configuration or a record; real ones have less than one MiB."""
PATIENCE = 10.0
"""Seconds without a byte that a pipe may take."""
CHUNK = 1 << 20
DEEPEST = 64
"""Objects and lists inside each other."""


def read_file(path: Path, what: str, largest: int = LARGEST_INPUT) -> bytes:
    """The bytes of a file, a pipe or whatever else can be read.

    Args:
        path: what was named.
        what: what it should be, for the message: "record", "tile file".
        largest: bytes that are read at the most; ``/dev/zero`` has no end.

    Raises:
        ConfigError: it can't be read, is larger, or is a pipe into which nobody writes.
    """
    pieces, size = [], 0
    try:
        # O_NONBLOCK: to open a FIFO is to wait for its writer, for ever if there is none
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb", buffering=0) as file:
            ready = select.poll()
            ready.register(file, select.POLLIN)
            end = time.monotonic() + PATIENCE
            while size <= largest:
                if not ready.poll(1000 * max(0.0, end - time.monotonic())):
                    raise ConfigError(f"{what} {path} can't be read: nothing came for {PATIENCE:.0f} seconds")
                piece = file.read(min(CHUNK, largest + 1 - size))
                if piece is None:  # another reader was faster
                    continue
                if not piece:
                    break
                pieces.append(piece)
                size += len(piece)
                end = time.monotonic() + PATIENCE
    except OSError as error:
        raise ConfigError(f"{what} {path} can't be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL in the name; or our own refusal
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{what} {str(path)!r} can't be read: {error}") from None
    if size > largest:
        raise ConfigError(f"{what} {path} has more than {largest} bytes; it is none")
    return b"".join(pieces)


def read_json(path: Path, what: str, largest: int = LARGEST_INPUT) -> Any:
    """The value of a JSON file.

    Raises:
        ConfigError: as `read_file`, or it is not JSON, or nested too deeply.
    """
    data = read_file(path, what, largest)
    try:
        return json.loads(data)
    except RecursionError:
        raise ConfigError(f"{what} {path} is nested too deeply") from None
    except ValueError as error:  # also what is no UTF-8, and numbers of thousands of digits
        raise ConfigError(f"{what} {path} is not JSON: {error}") from None


def read_object(path: Path, what: str, largest: int = LARGEST_INPUT) -> dict[str, Any]:
    """The object in a JSON file, and nothing that two readers could read in two ways.

    Beside what is no JSON, what Python's reader takes for it is refused: NaN and infinities, numbers beyond a float, a
    key that stands twice in an object, a surrogate without its other half, text that is no UTF-8.

    Raises:
        ConfigError: as `read_file`, or it is not such JSON, nested deeper than DEEPEST, or no object.
    """
    return parse_object(read_file(path, what, largest), f"{what} {path}")


def parse_object(data: bytes, place: str) -> dict[str, Any]:
    """`read_object` of bytes that are read already.

    Args:
        data: UTF-8, with or without a byte order mark.
        place: where they are from, for the message.

    Raises:
        ConfigError: as `read_object`.
    """
    try:
        content = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unambiguous, parse_constant=_no_number)
        _check_values(content)
    except RecursionError:
        raise ConfigError(f"{place} is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{place} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{place} is a {type(content).__name__}; it must be an object")
    return content


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice = next(key for key, after in pairwise(keys) if key == after)
        raise ValueError(f"an object has the key {twice!r:.60} twice")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _check_values(content: object) -> None:
    """Level by level: depth costs no stack."""
    level: list[object] = [content]
    for _ in range(DEEPEST + 1):
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value)
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
            elif isinstance(value, str) and not value.isascii():
                value.encode()  # a lone surrogate has no UTF-8
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError("a number is too large for a float")
        if not below:
            return
        level = below
    raise ValueError(f"it is nested deeper than {DEEPEST}")
