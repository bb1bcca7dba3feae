"""What the waves of a workgroup share: LDS, and who has touched what of it since the last barrier."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from epfuse.aot.isa.counts import LaunchCounts
from epfuse.aot.isa.errors import AccessError, HazardError
from epfuse.aot.isa.memory import Memory, grains_of

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
        grain: bytes that are looked after together: the smallest access of the program, at most 4.
    """

    def __init__(self, number: int, lds_bytes: int, memory: Memory, counts: LaunchCounts, grain: int = 1) -> None:
        size = -(-lds_bytes // 16) * 16
        self.number = number
        self.size = lds_bytes
        self.memory = memory
        self.counts = counts
        self.data: NDArray[np.uint8] = np.zeros(size, np.uint8)
        self.undefined: NDArray[np.uint8] = np.full(size, 255, np.uint8)
        self.words: NDArray[np.uint32] = self.data.view(np.uint32)
        self.undefined_words: NDArray[np.uint32] = self.undefined.view(np.uint32)
        self._grain = grain
        self._writer = np.full(size // grain, NOBODY, np.int8)
        self._adder = np.full(size // grain, NOBODY, np.int8)
        self._readers = np.zeros(size // grain, np.uint32)
        self._wrote = self._read = 0  # waves, a bit each
        self._added = False
        self._in_flight: dict[int, tuple[str, int, Places]] = {}
        self._stores: list[Places] = []
        self._next = 0

    def access(
        self, kind: str, wave: int, places: Places, size: int, line: int, written: NDArray[np.uint8] | None = None
    ) -> int:
        """Note that a wave reads, writes or adds to bytes.

        Args:
            kind: "read", "write" or "add".
            wave: which.
            places: first bytes, one for each lane.
            size: bytes of a lane.
            line: of the assembly.
            written: what is written, [lanes, size]; several waves may write the same.

        Returns:
            A ticket for `done`.

        Raises:
            AccessError: a byte is outside LDS.
            HazardError: another wave has touched a byte since the last barrier.
        """
        if places.size and not (places.min() >= 0 and places.max() + size <= self.size):
            outside = places[(places < 0) | (places + size > self.size)].flat[0]
            raise AccessError(f"{size} LDS bytes at {outside} are outside the workgroup's {self.size}", line)
        grains = grains_of(places, size, self._grain)
        self._judge(kind, wave, grains, line, places, written)
        self._mark(kind, wave, grains)
        self._next += 1
        self._in_flight[self._next] = (kind, wave, grains)
        return self._next

    def _judge(
        self, kind: str, wave: int, grains: Places, line: int, places: Places, written: NDArray[np.uint8] | None
    ) -> None:
        if self._wrote & ~(1 << wave):
            writer = self._writer[grains]
            others = (writer != NOBODY) & (writer != wave)
            if written is not None and others.any():
                changed = self.data[places[:, None] + np.arange(written.shape[1])] != written
                others &= changed.reshape(*others.shape, -1).any(axis=2)
            if others.any():
                raise HazardError(f"wave {wave} {kind}s LDS that another wave has written since the last barrier", line)
        if kind != "add" and self._added:
            adder = self._adder[grains]
            if ((adder != NOBODY) & (adder != wave)).any():
                raise HazardError(
                    f"wave {wave} {kind}s LDS that another wave has added to since the last barrier", line
                )
        if kind != "read" and self._read & ~(1 << wave) and (self._readers[grains] & ~np.uint32(1 << wave)).any():
            raise HazardError(f"wave {wave} {kind}s LDS that another wave has read since the last barrier", line)

    def _mark(self, kind: str, wave: int, grains: Places) -> None:
        if kind == "read":
            self._read |= 1 << wave
            self._readers[grains] |= np.uint32(1 << wave)
        elif kind == "write":
            self._wrote |= 1 << wave
            self._writer[grains] = wave
        else:
            self._added = True
            before = self._adder[grains]
            self._adder[grains] = np.where((before == NOBODY) | (before == wave), wave, MANY)

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
        if self._wrote:
            self._writer.fill(NOBODY)
        if self._added:
            self._adder.fill(NOBODY)
        if self._read:
            self._readers.fill(0)
        self._wrote = self._read = 0
        self._added = False
        for kind, wave, places in self._in_flight.values():
            self._mark(kind, wave, places)
