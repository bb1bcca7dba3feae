"""What a launch did, counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class LaunchCounts:
    """Work of one launch, all waves together.

    Attributes:
        instructions: executed wave instructions by opcode, without the encoding's suffix.
        loaded, stored: bytes that lanes asked global memory for, by buffer.
        lines_loaded, lines_stored: 128-byte cache lines that the instructions touched, each counted once an
            instruction, by buffer.
        lds_accesses: LDS instructions' passes without any conflict, by opcode.
        lds_conflicts: passes beyond them.
        waits: waits by counter that had something to wait for.
        barriers: barriers that a workgroup passed.
        reached: indices of the instructions that a wave executed with an active lane, or, of scalar ones, at all.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    loaded: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    lines_loaded: Counter[str] = field(default_factory=Counter)
    lines_stored: Counter[str] = field(default_factory=Counter)
    lds_accesses: Counter[str] = field(default_factory=Counter)
    lds_conflicts: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    barriers: int = 0
    reached: set[int] = field(default_factory=set)
