"""A Chrome trace's JSON, event by event, in memory that does not grow with the file.

The events are one huge array in an object of a few small values. The standard library's scanner (C code) decodes one
array element at a time out of a sliding window of text, so no third-party parser is needed.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from epfuse.errors import TraceError
from epfuse.profiling.text import printable

CHUNK = 4 << 20
"""Bytes read at a time."""
LARGEST_VALUE = 16 << 20
"""Characters that one event or one value beside the events may take: what is longer is no trace."""
SPLIT_TOKEN = 16
"""A JSON token that a chunk's end cut is reported by the scanner within this many characters of the end."""

MOST_UNPACKED = 32 << 20
"""Bytes that come out of a gzip file before it is asked whether it is a bomb."""
LARGEST_RATIO = 200
"""Bytes out of one byte of gzip: profilers' traces have 10 to 40; the format allows 1032, for nothing but one byte."""
MOST_BLANKS = 16 << 20
"""Characters of white space in a row."""

GZIP_MAGIC = b"\x1f\x8b"
BETWEEN = re.compile(r"[ \t\r\n]*,[ \t\r\n]*(?=\{)")
SEPARATORS = re.compile(r"[ \t\r\n]*")

Progress = Callable[[int, int], None]
"""Called with the bytes of the file that were read, and all its bytes."""


def stream_events(
    path: Path, on_value: Callable[[str, Any], None], progress: Progress | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the elements of ``traceEvents``; both the object and the bare-array form of the format are read.

    Args:
        path: JSON, plain or gzipped, which its first bytes decide and not its name.
        on_value: gets key and value of everything beside the events.
        progress: called after every chunk.

    Raises:
        TraceError: the file can't be read, is not JSON, is no trace, or ends early.
    """
    name = printable(str(path))
    try:
        with _open_regular(path, name) as raw:
            size = os.fstat(raw.fileno()).st_size
            if not size:
                raise TraceError(f"{name} is empty; it must be a Chrome trace (JSON, plain or gzipped)")
            magic = raw.read(2)
            raw.seek(0)
            data: Any = gzip.GzipFile(fileobj=raw) if magic == GZIP_MAGIC else raw
            unpacked = 0

            def report(read: int) -> None:
                nonlocal unpacked
                unpacked += read
                if unpacked > MOST_UNPACKED and unpacked > LARGEST_RATIO * raw.tell():
                    raise TraceError(f"{name}: its first {raw.tell()} bytes unpack to {unpacked}: that is no trace")
                if progress:
                    progress(min(raw.tell(), size), size)

            yield from _Window(name, data, report).events(on_value)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TraceError(f"{name} is damaged or cut short: gzip says {error}") from None
    except OSError as error:
        raise TraceError(f"{name} can't be read: {error.strerror or error}") from None


def check_trace(path: Path) -> None:
    """Refuse, before minutes of work on another trace, what can't be one: read its first event, or find out why not.

    Raises:
        TraceError: as `stream_events`.
    """
    next(stream_events(path, lambda *_: None), None)


def _open_regular(path: Path, name: str) -> BinaryIO:
    """The file, if it is one: a pipe or a device may have no end, and opening a FIFO may wait for ever."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb")
    except ValueError as error:  # a NUL in the name
        raise TraceError(f"{name} can't be read: {error}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise TraceError(f"{name} can't be read: it is no regular file; write the trace to one first")
    return file


class _Window:
    """The undecoded part of the text."""

    def __init__(self, path: str, data: BinaryIO, report: Callable[[int], None]) -> None:
        self.path = path
        self.data = data
        self.report = report
        self.decode = codecs.getincrementaldecoder("utf-8-sig")("replace").decode
        self.scan = json.JSONDecoder(strict=False).raw_decode  # tools write control characters as they are
        self.text = ""
        self.at = 0
        self.before = 0  # characters of the file that were dropped
        self.ended = False

    def events(self, on_value: Callable[[str, Any], None]) -> Iterator[dict[str, Any]]:
        opening = self.next_character()
        if opening == "[":
            yield from self.elements()
        elif opening == "{":
            found, separator = False, ""
            while (key := self.key(separator)) is not None:
                separator = ","
                if key == "traceEvents":
                    found = True
                    self.expect("[")
                    yield from self.elements()
                else:
                    on_value(key, self.value())
            if not found:
                raise TraceError(f"{self.path} has no 'traceEvents'; it must be a Chrome trace of the PyTorch profiler")
        else:
            raise self.broken("it must begin with an object or an array")
        if self.next_character(or_end=True):
            raise self.broken("there is more after the trace's end")

    def elements(self) -> Iterator[dict[str, Any]]:
        """What stands in an array whose bracket was read, up to and including the closing one."""
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            if self.peek() != "{":
                raise self.broken("an event must be an object")
            yield self.value()
            while comma := BETWEEN.match(self.text, self.at):  # most of the time: no need to look twice
                try:
                    event, self.at = self.scan(self.text, comma.end())
                except (ValueError, RecursionError):  # cut by the window's end, or wrong: `value` knows
                    break
                yield event
            separator = self.next_character()
            if separator == "]":
                return
            if separator != ",":
                raise self.broken("events must be separated by commas")

    def key(self, separator: str) -> str | None:
        """What follows the separator up to a key's colon; None at the object's end."""
        if self.peek() == "}":
            self.at += 1
            return None
        if separator:
            self.expect(separator)
        if self.peek() != '"':
            raise self.broken("a key must be a string")
        key = self.value()
        self.expect(":")
        return str(key)

    def value(self) -> Any:
        """Decode what begins at the next character that is no space."""
        self.peek()
        while True:
            try:
                value, end = self.scan(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - SPLIT_TOKEN
                if not cut:
                    self.at = error.pos
                    raise self.broken(error.msg) from None
                if len(self.text) - self.at > LARGEST_VALUE:
                    raise self.broken(f"one value is longer than {LARGEST_VALUE} characters") from None
                if not self.fill():
                    raise self.truncated() from None
            except RecursionError:
                raise self.broken("it is nested too deeply") from None
            except ValueError as error:  # an integer of thousands of digits
                raise self.broken(str(error)) from None
            else:
                # a number that ends near the text's end may go on: of 0.5e3, a chunk may have had 0 or 0.5e
                if end <= len(self.text) - SPLIT_TOKEN or not self.fill():
                    self.at = end
                    return value

    def expect(self, character: str) -> None:
        if self.next_character() != character:
            raise self.broken(f"{character!r} must stand here")

    def next_character(self, or_end: bool = False) -> str:
        character = self.peek(or_end)
        self.at += 1
        return character

    def peek(self, or_end: bool = False) -> str:
        """The next character that is no space; empty at the end if that is allowed."""
        blanks_end = self.before + self.at + MOST_BLANKS
        while True:
            match = SEPARATORS.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if self.before + self.at > blanks_end:
                raise self.broken(f"more than {MOST_BLANKS} characters of white space")
            if not self.fill():
                if or_end:
                    return ""
                raise self.truncated()

    def fill(self) -> bool:
        """Drop what was decoded and read on; False at the end of the file, which leaves everything in its place."""
        if self.ended:
            return False
        chunk = self.data.read(CHUNK)
        self.report(len(chunk))
        if not chunk:
            self.ended = True
            self.text += self.decode(b"", final=True)
            return False
        self.before += self.at
        self.text = self.text[self.at :] + self.decode(chunk)
        self.at = 0
        return True

    def broken(self, reason: str) -> TraceError:
        return TraceError(f"{self.path} is not a JSON trace: {reason} (character {self.before + self.at})")

    def truncated(self) -> TraceError:
        return TraceError(f"{self.path} ends early, after {self.before + len(self.text)} characters; was it cut short?")
