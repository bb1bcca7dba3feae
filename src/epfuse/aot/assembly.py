"""Counts of a kernel's instructions, of all and of those in its main loop; the same for both vendors' assembly."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_jsonable_python


@dataclass
class InstructionCounts:
    """Instructions by what they do.

    Attributes:
        matrix: name of a matrix instruction -> count.
        matrix_macs: multiply-adds of all of them, for one wave (AMD), warp or warpgroup (NVIDIA: ``matrix_warps``).
        matrix_warps: how many warps issue one matrix instruction together.
        load_widths: bytes that one lane loads from memory -> count; copies to shared memory included.
        store_widths: bytes that one lane stores -> count.
        atomics: name -> count, on memory; not those on shared memory.
        waits: instructions that wait for loads or copies.
        barriers: of the workgroup.
        vector: vector ALU instructions, without matrix ones.
        bulk_copies: TMA copies.
        private: accesses of scratch (AMD) or local memory (NVIDIA).
    """

    matrix: Counter[str] = field(default_factory=Counter)
    matrix_macs: int = 0
    matrix_warps: int = 1
    load_widths: Counter[int] = field(default_factory=Counter)
    store_widths: Counter[int] = field(default_factory=Counter)
    atomics: Counter[str] = field(default_factory=Counter)
    waits: int = 0
    barriers: int = 0
    vector: int = 0
    bulk_copies: int = 0
    private: int = 0

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        values: dict[str, Any] = to_jsonable_python(self, exclude={"matrix_macs", "matrix_warps", "private"})
        return values


@dataclass(frozen=True)
class Dialect:
    """How to read one kind of assembly.

    Attributes:
        label: matches a label's line; group 1 is its name.
        branch: matches a branch's line; group 1 is where it goes.
        opcode: matches an instruction's line; group 1 is its name with modifiers.
        count: adds one instruction, its name and its line, to the counts.
    """

    label: re.Pattern[str]
    branch: re.Pattern[str]
    opcode: re.Pattern[str]
    count: Callable[[InstructionCounts, str, str], None]

    def counts(self, lines: Sequence[str]) -> InstructionCounts:
        """Counts over ``lines``."""
        found = InstructionCounts()
        for line in lines:
            match = self.opcode.match(line)
            if match:
                self.count(found, match[1], line)
        return found

    def main_loop(self, lines: Sequence[str]) -> list[str]:
        """The lines of the innermost loop that multiplies most; empty if none has matrix instructions."""
        best: list[str] = []
        most = 0
        for first, last in self._innermost(lines):
            body = list(lines[first : last + 1])
            macs = self.counts(body).matrix_macs
            if macs > most:
                best, most = body, macs
        return best

    def _innermost(self, lines: Sequence[str]) -> list[tuple[int, int]]:
        """First and last line of every loop with matrix instructions that holds no other such loop."""
        labels = {match[1]: index for index, line in enumerate(lines) if (match := self.label.match(line))}
        loops = []
        for index, line in enumerate(lines):
            match = self.branch.match(line)
            if match and labels.get(match[1], len(lines)) <= index:
                first = labels[match[1]]
                if self.counts(lines[first : index + 1]).matrix:
                    loops.append((first, index))
        return [
            loop
            for loop in loops
            if not any(other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in loops)
        ]
