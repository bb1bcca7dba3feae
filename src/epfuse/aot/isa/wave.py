"""What a wave holds: registers, which of their bits are undefined, and what it still waits for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from epfuse.aot.isa.errors import UndefinedError
from epfuse.aot.isa.program import Instruction
from epfuse.aot.isa.registers import ALL, EXEC, LANES, SCC, VECTORS, names_of

if TYPE_CHECKING:
    from epfuse.aot.isa.hazards import Outstanding, Recent
    from epfuse.aot.isa.workgroup import Workgroup

Row = NDArray[np.uint32]
Lanes = NDArray[np.bool_]
ALL_LANES = (1 << LANES) - 1
FULL = np.uint32(0xFFFFFFFF)


@lru_cache(maxsize=8192)
def lanes_of(mask: int) -> Lanes:
    """Bits of a 64-bit mask as one truth value a lane."""
    bits = np.frombuffer(mask.to_bytes(8, "little"), np.uint8)
    lanes = np.unpackbits(bits, bitorder="little").view(np.bool_)
    lanes.flags.writeable = False
    return lanes


def mask_of(lanes: Lanes) -> int:
    """One truth value a lane as bits of a 64-bit mask."""
    return int.from_bytes(np.packbits(lanes, bitorder="little").tobytes(), "little")


class Files:
    """The vector registers of a wave: one wave after the other has them.

    Attributes:
        values, shadows: of each register its lanes' 32 bits, and those that nothing has defined.
        rows, shadow_rows: the same, one by one.
    """

    __slots__ = ("rows", "shadow_rows", "shadows", "values")

    def __init__(self) -> None:
        self.values: Row = np.zeros((ALL - VECTORS, LANES), np.uint32)
        self.shadows: Row = np.zeros((ALL - VECTORS, LANES), np.uint32)
        self.rows: list[Row] = list(self.values)
        self.shadow_rows: list[Row] = list(self.shadows)

    def begin(self) -> None:
        """A wave begins."""
        self.values.fill(0)
        self.shadows.fill(FULL)


class Wave:
    """64 lanes that execute together.

    Attributes:
        number: in its workgroup.
        place: number of the next instruction.
        scalars: of each scalar register its 32 bits; SCC is one of them.
        file, rows: of each vector register its lanes' 32 bits, as one array and one by one.
        lanes: which lanes are active; None for all.
        scalar_shadows, shadow_file, shadows: for each bit of a register whether nothing has defined it.
        undefined: registers with such bits, as a set.
        waits: what was asked for and has not been waited for.
        recent: results that instructions to come may need to keep a distance from.
        clock: wait states that have passed.
        group: the workgroup.
    """

    __slots__ = (
        "clock",
        "file",
        "group",
        "lanes",
        "number",
        "place",
        "recent",
        "rows",
        "scalar_shadows",
        "scalars",
        "shadow_file",
        "shadows",
        "undefined",
        "waits",
    )

    def __init__(
        self, number: int, group: Workgroup, waits: Outstanding, recent: Recent, files: Files | None = None
    ) -> None:
        files = files or Files()
        files.begin()
        self.number: int = number
        self.group: Workgroup = group
        self.place: int = 0
        self.clock: int = 0
        self.waits: Outstanding = waits
        self.recent: Recent = recent
        self.scalars: list[int] = [0] * VECTORS
        self.scalar_shadows: list[int] = [0xFFFFFFFF] * VECTORS
        self.file: Row = files.values
        self.shadow_file: Row = files.shadows
        self.rows: list[Row] = files.rows
        self.shadows: list[Row] = files.shadow_rows
        self.undefined: int = (1 << ALL) - 1
        self.lanes: Lanes | None = None
        self.set_pair(EXEC, ALL_LANES)
        self.define_scalar(EXEC, 2)

    def pair(self, first: int) -> int:
        """64 bits of two scalar registers."""
        return self.scalars[first] | self.scalars[first + 1] << 32

    def set_pair(self, first: int, value: int) -> None:
        """Write two scalar registers."""
        self.scalars[first] = value & 0xFFFFFFFF
        self.scalars[first + 1] = value >> 32
        if first == EXEC:
            self.lanes = None if value == ALL_LANES else lanes_of(value)

    def define_scalar(self, first: int, count: int = 1) -> None:
        """Scalar registers hold defined bits from now on."""
        for number in range(first, first + count):
            self.scalar_shadows[number] = 0
        self.undefined &= ~(((1 << count) - 1) << first)

    def shade_scalar(self, number: int, shadow: int) -> None:
        """Say which bits of a scalar register are undefined."""
        self.scalar_shadows[number] = shadow
        if shadow:
            self.undefined |= 1 << number
        else:
            self.undefined &= ~(1 << number)

    def write(self, row: int, value: Any) -> None:
        """Write a vector register in the active lanes."""
        if self.lanes is None:
            self.rows[row][...] = value
        else:
            np.copyto(self.rows[row], value, where=self.lanes)

    def shade(self, row: int, shadow: Row | np.uint32 | int, lanes: Lanes | None = None) -> None:
        """Say which bits of a vector register are undefined, in ``lanes`` or the active ones."""
        own = self.shadows[row]
        if lanes is None:
            lanes = self.lanes
        if lanes is None:
            own[...] = shadow
        else:
            np.copyto(own, np.uint32(shadow) if isinstance(shadow, int) else shadow, where=lanes)
        if own.any():
            self.undefined |= 1 << (row + VECTORS)
        else:
            self.undefined &= ~(1 << (row + VECTORS))

    def active(self) -> Lanes:
        """Which lanes are active."""
        return lanes_of(ALL_LANES) if self.lanes is None else self.lanes

    @property
    def scc(self) -> int:
        return self.scalars[SCC]


@dataclass(slots=True)
class Step:
    """One decoded instruction.

    Attributes:
        instruction: what was decoded.
        name: the opcode without the encoding's suffix.
        kind: "salu", "smem", "valu", "mfma", "lds", "vmem", "flow".
        run: does it.
        reads, writes: sets of registers.
        shade: says which bits of the result are undefined; called before `run` if an operand has any.
        states: wait states that it takes.
        stops: whether the wave stops here, at a barrier or at its end.
        near: whether it must keep a distance from any vector instruction that wrote what it reads.
        facts: what the hazard rules ask of this kind of instruction.
        touched: what it reads or writes.
        noted: whether instructions to come may have to keep a distance from it.
    """

    instruction: Instruction
    name: str
    kind: str
    run: Callable[[Wave], None]
    reads: int
    writes: int
    shade: Callable[[Wave], None]
    states: int = 1
    stops: bool = False
    near: bool = False
    facts: dict[str, int] = field(default_factory=dict)
    touched: int = 0
    noted: bool = False

    def __post_init__(self) -> None:
        self.touched = self.reads | self.writes
        self.noted = self.kind in ("valu", "mfma") or "stored" in self.facts


def refuse_undefined(reads: int, instruction: Instruction, what: str) -> Callable[[Wave], None]:
    """A `Step.shade` for registers that must be defined: they decide an address or a branch."""

    def shade(wave: Wave) -> None:
        if found := wave.undefined & reads:
            raise UndefinedError(
                f"undefined bits of {names_of(found)} decide {what}: {instruction.text}", instruction.line
            )

    return shade
