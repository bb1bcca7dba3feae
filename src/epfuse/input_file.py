"""Files from outside, read within limits of size and time, whatever their name leads to."""

from __future__ import annotations

import json
import os
import select
import time
from pathlib import Path
from typing import Any

from epfuse.errors import ConfigError

LARGEST_INPUT = 16 << 20
"""Bytes of a configuration or a record; real ones have less than one MiB."""
PATIENCE = 10.0
"""Seconds without a byte that a pipe may take."""
CHUNK = 1 << 20


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
