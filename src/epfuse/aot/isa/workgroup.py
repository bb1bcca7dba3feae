"""What the waves of a workgroup share: LDS, and who has touched what of it since the last barrier."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from epfuse.aot.isa.counts import Counts
from epfuse.aot.isa.errors import AccessError, HazardError
from epfuse.aot.isa.memory import Memory

Places = NDArray[np.int64]
NOBODY, MANY = -1, -2


class Workgroup:
    """A workgroup's LDS.

    Between two barriers a byte that one wave has written must be left alone by the others, and so must a byte, for
    writing, that another wave has read. What a wave has not waited for when it passes a barrier goes on counting.

    Attributes:
        number: of the workgroup in the grid.
        data, undefined: LDS bytes and which of their bits nothing has defined.
        memory, counts: of the launch.
    """

    def __init__(self, number: int, lds_bytes: int, memory: Memory, counts: Counts) -> None:
        size = -(-lds_bytes // 16) * 16
        self.number = number
        self.size = lds_bytes
        self.memory = memory
        self.counts = counts
        self.data = np.zeros(size, np.uint8)
        self.undefined = np.full(size, 255, np.uint8)
        self.words = self.data.view(np.uint32)
        self.undefined_words = self.undefined.view(np.uint32)
        self._writer = np.full(size, NOBODY, np.int8)
        self._adder = np.full(size, NOBODY, np.int8)
        self._readers = np.zeros(size, np.uint32)
        self._touched = False
        self._in_flight: dict[int, tuple[str, int, Places]] = {}
        self._stores: list[Places] = []
        self._next = 0

    def access(self, kind: str, wave: int, places: Places, line: int, written: NDArray[np.uint8] | None = None) -> int:
        """Note that a wave reads, writes or adds to bytes.

        Args:
            kind: "read", "write" or "add".
            wave: which.
            places: bytes, any shape.
            line: of the assembly.
            written: what is written to each byte; several waves may write the same.

        Returns:
            A ticket for `done`.

        Raises:
            AccessError: a byte is outside LDS.
            HazardError: another wave has touched a byte since the last barrier.
        """
        if places.size and not (places.min() >= 0 and places.max() < self.size):
            outside = places[(places < 0) | (places >= self.size)].flat[0]
            raise AccessError(f"LDS byte {outside} is outside the workgroup's {self.size}", line)
        self._judge(kind, wave, places, line, written)
        self._mark(kind, wave, places)
        self._next += 1
        self._in_flight[self._next] = (kind, wave, places)
        return self._next

    def _judge(self, kind: str, wave: int, places: Places, line: int, written: NDArray[np.uint8] | None) -> None:
        writer = self._writer[places]
        others = (writer != NOBODY) & (writer != wave)
        if written is not None:
            others &= self.data[places] != written
        if others.any():
            raise HazardError(f"wave {wave} {kind}s LDS that another wave has written since the last barrier", line)
        if kind != "add":
            adder = self._adder[places]
            if ((adder != NOBODY) & (adder != wave)).any():
                raise HazardError(
                    f"wave {wave} {kind}s LDS that another wave has added to since the last barrier", line
                )
        if kind != "read" and (self._readers[places] & ~np.uint32(1 << wave)).any():
            raise HazardError(f"wave {wave} {kind}s LDS that another wave has read since the last barrier", line)

    def _mark(self, kind: str, wave: int, places: Places) -> None:
        self._touched = True
        if kind == "read":
            self._readers[places] |= np.uint32(1 << wave)
        elif kind == "write":
            self._writer[places] = wave
        else:
            before = self._adder[places]
            self._adder[places] = np.where((before == NOBODY) | (before == wave), wave, MANY)

    def done(self, ticket: int) -> None:
        """A wave has waited for an access."""
        del self._in_flight[ticket]

    def stored(self, places: Places) -> None:
        """A wave has waited for a store to memory."""
        self._stores.append(places)

    def barrier(self) -> None:
        """All waves are at a barrier."""
        self.counts.barriers += 1
        for places in self._stores:
            self.memory.settle(places, self.number)
        self._stores.clear()
        if not self._touched:
            return
        self._writer.fill(NOBODY)
        self._adder.fill(NOBODY)
        self._readers.fill(0)
        self._touched = False
        for kind, wave, places in self._in_flight.values():
            self._mark(kind, wave, places)
