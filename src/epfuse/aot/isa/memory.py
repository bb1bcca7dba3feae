"""The device's memory: buffers at addresses, with a mark on every bit that nothing has defined."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from epfuse.aot.isa.errors import AccessError, HazardError

Bytes = NDArray[np.uint8]
Places = NDArray[np.int64]
BASE = 0x7E40_0000_0000
"""The first address: V# bases have 48 bits."""
GUARD = 4096
"""Bytes between buffers."""
NOBODY, ADDED, SETTLED = -1, -2, -3
"""Who has written a byte in a launch, if it is no single wave; from `SETTLED` down a workgroup."""


@dataclass(frozen=True)
class Buffer:
    """A placed array: its name, address and bytes."""

    name: str
    address: int
    size: int

    @property
    def end(self) -> int:
        return self.address + self.size


def grains_of(places: Places, size: int, grain: int) -> Places:
    """Numbers of the grains, [lanes, grains of a lane], of accesses that begin at bytes ``places``."""
    first = (places // grain)[:, None]
    return first if size <= grain else np.asarray(first + _count(size // grain))


@cache
def _count(grains: int) -> Places:
    return np.arange(grains)


class Memory:
    """Buffers in one address space.

    ``data`` and ``undefined`` are the bytes from `BASE` on and, for each, the bits that nothing has defined.
    ``writer`` says of each grain, a few bytes, which wave has written it in this launch.
    """

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._starts: list[int] = []
        self.data: Bytes = np.zeros(GUARD, np.uint8)
        self.undefined: Bytes = np.full(GUARD, 255, np.uint8)
        self._grain = 1
        self.writer: NDArray[np.int32] = np.full(GUARD, NOBODY, np.int32)
        self._written = False

    def place(self, array: NDArray[np.generic], name: str, *, defined: bool = True, align: int = 16) -> int:
        """Copy an array in.

        Args:
            array: any shape and dtype; its bytes are copied in C order.
            name: for messages.
            defined: False marks the bytes as undefined; a kernel must write what it then reads.
            align: bytes; the address is a multiple of it and, where it is below `GUARD`, of no larger power of two.

        Returns:
            The address.
        """
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start = -(-(len(self.data) + GUARD) // (2 * align)) * 2 * align + align % GUARD
        size = start + len(raw) + GUARD
        data, undefined = np.zeros(-(-size // 16) * 16, np.uint8), np.full(-(-size // 16) * 16, 255, np.uint8)
        data[: len(self.data)], undefined[: len(self.data)] = self.data, self.undefined
        data[start : start + len(raw)] = raw
        undefined[start : start + len(raw)] = 0 if defined else 255
        self.data, self.undefined = data, undefined
        self.buffers.append(Buffer(name, BASE + start, len(raw)))
        self._starts.append(BASE + start)
        return BASE + start

    def read(self, address: int, size: int) -> Bytes:
        """A copy of ``size`` bytes, which must lie in one buffer."""
        self.check(address, address + size)
        return self.data[address - BASE : address - BASE + size].copy()

    def undefined_bytes(self, address: int, size: int) -> NDArray[np.bool_]:
        """Which of ``size`` bytes hold a bit that nothing has defined."""
        self.check(address, address + size)
        return np.not_equal(self.undefined[address - BASE : address - BASE + size], 0)

    def buffer_of(self, address: int) -> Buffer | None:
        """The last buffer that begins at or before an address."""
        place = bisect_right(self._starts, address) - 1
        return self.buffers[place] if place >= 0 else None

    def check(self, first: int, end: int) -> None:
        """Raise unless one buffer holds ``[first, end)``.

        Raises:
            AccessError: none does.
        """
        buffer = self.buffer_of(first)
        if buffer is None or end > buffer.end:
            near = (
                "before the first buffer"
                if buffer is None
                else f"{first - buffer.end:+d} bytes from the end of {buffer.name}"
            )
            raise AccessError(f"{end - first} bytes at {first:#x} are in no buffer: {near}")

    def begin(self, grain: int = 1) -> None:
        """A launch begins, nobody has written anything in it; ``grain`` is its smallest access in bytes, at most 4."""
        self._grain = grain
        self.writer = np.full(len(self.data) // grain, NOBODY, np.int32)
        self._written = False

    def touch(
        self, kind: str, owner: int, group: int, places: Places, size: int, line: int, written: Bytes | None = None
    ) -> Places:
        """Note that a wave reads, writes or adds to bytes.

        Args:
            kind: "read", "write" or "add".
            owner: number of the wave in the launch.
            group: number of its workgroup.
            places: first bytes, from `BASE` on, one for each lane.
            size: bytes of a lane.
            line: of the assembly.
            written: what is written, [lanes, size]; several waves may write the same.

        Returns:
            What `settle` takes.

        Raises:
            HazardError: another wave of the launch has written a byte and it is not known to be there.
        """
        grains = grains_of(places, size, self._grain)
        if kind == "read" and not self._written:
            return grains
        self._written = True
        writer = self.writer[grains]
        if kind == "add":
            free = (writer == NOBODY) | (writer == ADDED)
        else:
            free = (writer == NOBODY) | (writer == owner) | (writer == SETTLED - group)
        if written is not None and not free.all():
            same = self.data[places[:, None] + np.arange(size)] == written
            free |= same.reshape(*free.shape, -1).all(axis=2) & (writer != ADDED)
        if not free.all():
            place = BASE + int(grains[~free].flat[0]) * self._grain
            buffer = self.buffer_of(place)
            name = "memory" if buffer is None else f"{buffer.name} at byte {place - buffer.address}"
            raise HazardError(f"{kind}s {name}, which another wave has written in this launch", line)
        if kind != "read":
            self.writer[grains] = ADDED if kind == "add" else owner
        return grains

    def settle(self, grains: Places, group: int) -> None:
        """What a wave has stored and waited for is there for its workgroup, which was at a barrier."""
        self.writer[grains] = SETTLED - group
