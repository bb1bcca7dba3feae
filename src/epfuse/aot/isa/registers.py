"""Names and numbers of registers.

One number space holds every register of a wave, so that a set of registers is one integer with a bit for each.
"""

from __future__ import annotations

from dataclasses import dataclass

SCALARS, VECTORS, ACCUMULATORS = 0, 136, 392
"""Where the scalar, the vector and the accumulation registers begin."""
SCC = 128
ALL = 648
"""How many numbers there are."""
VCC, M0, EXEC = 106, 124, 126
LANES = 64

NAMED = {
    "vcc": (VCC, 2),
    "vcc_lo": (VCC, 1),
    "vcc_hi": (VCC + 1, 1),
    "exec": (EXEC, 2),
    "exec_lo": (EXEC, 1),
    "exec_hi": (EXEC + 1, 1),
    "m0": (M0, 1),
}
FILES = {"s": (SCALARS, 102), "v": (VECTORS, 256), "a": (ACCUMULATORS, 256)}


@dataclass(frozen=True)
class Register:
    """One or more adjacent registers as an operand.

    Attributes:
        first: number of the first one.
        count: how many.
        negate, absolute, extend: the operand's modifiers; ``extend`` is SDWA's ``sext``.
    """

    first: int
    count: int = 1
    negate: bool = False
    absolute: bool = False
    extend: bool = False

    @property
    def is_scalar(self) -> bool:
        """Whether it is of a wave, not of its lanes."""
        return self.first < VECTORS

    @property
    def row(self) -> int:
        """Of a vector register: its row in the wave's file."""
        return self.first - VECTORS

    @property
    def mask(self) -> int:
        """A bit for each register."""
        return ((1 << self.count) - 1) << self.first

    def __str__(self) -> str:
        return (
            name_of(self.first) if self.count == 1 else f"{name_of(self.first)}..{name_of(self.first + self.count - 1)}"
        )


def name_of(number: int) -> str:
    """What assembly calls a register."""
    if number == SCC:
        return "scc"
    for name, (first, count) in NAMED.items():
        if count == 1 and first == number:
            return name
    letter = "a" if number >= ACCUMULATORS else "v" if number >= VECTORS else "s"
    return f"{letter}{number - FILES[letter][0]}"


def names_of(mask: int) -> str:
    """The registers of a set."""
    return ", ".join(name_of(number) for number in range(ALL) if mask >> number & 1)
