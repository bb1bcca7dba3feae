"""What an executed GEMM did, beside what the time model assumes of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from epfuse.aot.isa.recorded import Launched

LINE = 128
"""Bytes of a cache line of MI300X's L2 (CDNA3 ISA guide)."""
KINDS: dict[str, tuple[str, ...]] = {
    "matrix": ("v_mfma",),
    "vector": ("v_",),
    "LDS": ("ds_",),
    "memory": ("buffer_", "global_"),
    "scalar": ("s_",),
}
"""Kind -> how its opcodes begin; the first that fits."""
WAITS = frozenset({"s_waitcnt", "s_nop", "s_barrier", "s_sleep", "s_setprio"})
WEIGHTS = {"w13", "w2"}


@dataclass(frozen=True)
class GemmWork:
    """One launch of a GEMM.

    Attributes:
        kernel: its name.
        waves: that it had.
        instructions: executed wave instructions by kind.
        weight_bytes: weights and their scales that lanes asked for.
        line_bytes: of the cache lines that those loads touched, each counted once an instruction.
        assumed_bytes: what the time model takes for the weights: each active expert's once.
        lds_passes: of the LDS, without conflicts.
        lds_conflicts: passes beyond them.
    """

    kernel: str
    waves: int
    instructions: dict[str, int]
    weight_bytes: int
    line_bytes: int
    assumed_bytes: int
    lds_passes: int
    lds_conflicts: int


def work_of(launched: Launched) -> GemmWork | None:
    """None for a launch that multiplies no weights."""
    recorded, counts = launched.recorded, launched.counts
    names = [name for name in recorded.arguments if name.removesuffix("_scale") in WEIGHTS]
    if not names:
        return None
    kinds: Counter[str] = Counter()
    for opcode, times in counts.instructions.items():
        kinds[_kind(opcode)] += times
    weights = [recorded.arguments[name] for name in names if recorded.arguments[name] is not None]
    used = int(recorded.tensor("num_padded")) // recorded.arguments["BLOCK_M"]
    active = len(set(recorded.tensor("block_expert")[:used].tolist()))
    experts = weights[0].shape[0]
    x, y, z = recorded.grid
    return GemmWork(
        kernel=recorded.program.name,
        waves=x * y * z * recorded.threads // 64,
        instructions=dict(kinds),
        weight_bytes=sum(counts.loaded[name] for name in names),
        line_bytes=LINE * sum(counts.lines_loaded[name] for name in names),
        assumed_bytes=sum(tensor.nbytes for tensor in weights) * active // experts,
        lds_passes=counts.lds_accesses.total(),
        lds_conflicts=counts.lds_conflicts.total(),
    )


def _kind(opcode: str) -> str:
    if opcode in WAITS:
        return "wait"
    return next((kind for kind, begins in KINDS.items() if opcode.startswith(begins)), "other")
