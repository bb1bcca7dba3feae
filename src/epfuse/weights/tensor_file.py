"""Safetensors files that nobody has checked yet: a header within limits, and tensors read into memory that is there.

Files are read, not mapped. A read takes what was asked for and not a byte more from the disk, and lays it where it is
to be; and a file that somebody cuts short meanwhile is an error. A mapped one would end the process (SIGBUS).

Source of the format and of what it forbids: the README of the safetensors project, "Format". Whatever its own reader
refuses is refused here; duplicate names, which it takes, are refused too.
"""

from __future__ import annotations

import ctypes
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from epfuse.errors import CheckpointError, ConfigError
from epfuse.input_file import parse_object

LARGEST_HEADER = 24 << 20
"""Bytes; the tensors of a model with 70,000 matrices take 12 MB in one file."""
MOST_DIMENSIONS = 16
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Numbers that the format has -> bits of one."""
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "C64": torch.complex64,
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
"""Those that are a torch dtype."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: where it is.
        name: its name.
        kind: its numbers, a key of `BITS`.
        shape: its size.
        begin: byte of the file where it begins.
        nbytes: bytes that it takes.
    """

    file: TensorFile
    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype.

        Raises:
            CheckpointError: torch has none for its numbers.
        """
        if self.kind not in DTYPES:
            raise CheckpointError(
                f"{self.name} in {self.file.path.name} is in {self.kind}, which torch has no dtype for"
            )
        return DTYPES[self.kind]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the first dimension."""
        return self.nbytes // self.shape[0]

    def read(self) -> torch.Tensor:
        """All of it, in new memory.

        Raises:
            CheckpointError: as `read_into`.
        """
        out = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self.read_into(out)
        return out

    def read_into(self, out: torch.Tensor, row: int | None = None) -> None:
        """Its bytes, or those of one row, into memory that is there.

        Args:
            out: contiguous, on the CPU, of as many bytes.
            row: an index of the first dimension; None for all.

        Raises:
            CheckpointError: the file can't be read, or is not what it was when its header was read.
        """
        size = self.nbytes if row is None else self.row_bytes
        assert out.is_contiguous()
        assert out.nbytes == size
        self.file.read(self.begin + (row or 0) * size, out)


class TensorFile:
    """One safetensors file whose header is checked.

    Args:
        path: a regular file.

    Attributes:
        path: the same.
        tensors: what it has, by name.

    Raises:
        CheckpointError: it can't be read, or is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        with _opened(path) as handle:
            self._identity = _identity(os.fstat(handle))
            try:
                self.tensors: Mapping[str, StoredTensor] = {
                    tensor.name: tensor for tensor in self._read_header(handle, os.fstat(handle).st_size)
                }
            except ConfigError as reason:
                raise CheckpointError(str(reason)) from None
            except OSError as error:
                raise self._refuse(f"{error.strerror}") from None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keep the file open for several reads.

        Raises:
            CheckpointError: it is another file by now.
        """
        if self._handle is not None:
            yield
            return
        with _opened(self.path) as handle:
            if _identity(os.fstat(handle)) != self._identity:
                raise CheckpointError(f"{self.path} was changed while it was being read; load again when it is whole")
            self._handle = handle
            try:
                yield
            finally:
                self._handle = None

    def read(self, begin: int, out: torch.Tensor) -> None:
        """Bytes of the file into a tensor's memory; see `StoredTensor.read_into`.

        Args:
            begin: the first one.
            out: contiguous, on the CPU; ``out.nbytes`` bytes are read.

        Raises:
            CheckpointError: the file can't be read, or ends before.
        """
        if not out.nbytes:
            return
        memory = memoryview((ctypes.c_char * out.nbytes).from_address(out.data_ptr())).cast("B")
        with self.open():
            assert self._handle is not None
            done = 0
            while done < out.nbytes:
                try:
                    found = os.preadv(self._handle, [memory[done:]], begin + done)
                except OSError as error:
                    raise CheckpointError(f"{self.path} can't be read: {error.strerror}") from None
                if not found:
                    raise CheckpointError(
                        f"{self.path} ends at byte {begin + done}: it was cut short while it was read"
                    )
                done += found

    def _read_header(self, handle: int, size: int) -> Iterator[StoredTensor]:
        length = int.from_bytes(os.pread(handle, 8, 0), "little")
        if size < 8 or length > size - 8:
            raise self._refuse(f"it has {size} bytes and its header would take {length}; it is cut short or none")
        if length > LARGEST_HEADER:
            raise self._refuse(f"its header has {length} bytes, more than {LARGEST_HEADER}")
        text = os.pread(handle, length, 8)
        if text[:1] != b"{":
            raise self._refuse("its header does not begin with '{'")
        content = parse_object(text, f"the safetensors header of {self.path}")
        metadata = content.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._refuse("__metadata__ must hold strings")
        found = sorted(
            (self._tensor(name, entry, 8 + length) for name, entry in content.items()),
            key=lambda tensor: (tensor.begin, tensor.nbytes),
        )
        end = 8 + length
        for tensor in found:
            if tensor.begin != end:
                what = "overlaps what comes before it" if tensor.begin < end else "leaves a hole before it"
                raise self._refuse(f"{tensor.name!r:.80} {what}, at byte {tensor.begin}")
            end += tensor.nbytes
        if end != size:
            raise self._refuse(f"its tensors end at byte {end}, and it has {size}: it is cut short or none")
        yield from found

    def _tensor(self, name: str, entry: Any, offset: int) -> StoredTensor:
        fields = entry if isinstance(entry, dict) else {}
        kind, shape, place = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        where = f"{name!r:.80}"
        if len(fields) != 3 or not _are_sizes(shape) or not _are_sizes(place) or len(place) != 2:
            raise self._refuse(f"{where} must have dtype, shape and two data_offsets, all counts; it is {entry!r:.80}")
        if not isinstance(kind, str) or kind not in BITS:
            raise self._refuse(f"{where} has dtype {kind!r:.40}, which the format does not have")
        if len(shape) > MOST_DIMENSIONS:
            raise self._refuse(f"{where} has {len(shape)} dimensions; at most {MOST_DIMENSIONS} are read")
        bits = math.prod(shape) * BITS[kind]
        if bits != 8 * (place[1] - place[0]):
            raise self._refuse(
                f"{where} takes {place[1] - place[0]} bytes; {kind} {shape!r:.80} would take {bits // 8}"
            )
        return StoredTensor(self, name, kind, tuple(shape), offset + place[0], place[1] - place[0])

    def _refuse(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} can't be read as safetensors: {why}")


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        # O_NONBLOCK: to open a FIFO would be to wait for its writer
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} can't be read as safetensors: {reason}") from None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise CheckpointError(f"{path} can't be read as safetensors: it is no regular file")
        # or the kernel reads ahead, a quarter more than one rank's experts
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        yield handle
    finally:
        os.close(handle)
