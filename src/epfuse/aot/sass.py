"""Resources, occupancy and instructions of NVIDIA kernels, from the tools that Triton brings: cuobjdump and nvdisasm.

Vector instructions are not counted: SASS has no common prefix for them.

Occupancy follows the CUDA programming guide's table for compute capability 9.0.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from epfuse.aot.assembly import Dialect, InstructionCounts
from epfuse.errors import MissingDependency

MOST_WARPS = 64
MOST_BLOCKS = 32
REGISTERS = 65536
REGISTER_STEP = 256
"""Registers are given to a warp in steps of 256."""
SHARED_BYTES = 228 * 1024
MOST_SHARED_BYTES = 227 * 1024
"""Of one block."""
RESERVED_BYTES = 1024
"""Shared memory that each block takes besides its own."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes.

    Attributes:
        registers: of a thread.
        stack_bytes: of a thread, spills included.
        local_bytes: of a thread.
        shared_bytes: of a block.
        warps: of a block.
    """

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    warps: int


@dataclass(frozen=True)
class Occupancy:
    """How many of a kernel's blocks a multiprocessor holds, and what allows no more."""

    blocks_per_sm: int
    limits: tuple[str, ...]


def occupancy(resources: Resources) -> Occupancy:
    """Blocks that fit a multiprocessor."""
    warp_registers = -(-resources.registers * 32 // REGISTER_STEP) * REGISTER_STEP
    fits = {
        "registers": REGISTERS // warp_registers // resources.warps,
        "shared": SHARED_BYTES // (resources.shared_bytes + RESERVED_BYTES),
        "warps": min(MOST_WARPS // resources.warps, MOST_BLOCKS),
    }
    blocks = min(fits.values())
    return Occupancy(blocks, tuple(sorted(name for name, number in fits.items() if number == blocks)))


def disassemble(cubin: bytes, shared_bytes: int, warps: int) -> tuple[Resources, str]:
    """Resources and SASS of the one kernel in ``cubin``.

    Args:
        cubin: what Triton made.
        shared_bytes: of a block, from Triton's metadata.
        warps: of a block.

    Raises:
        MissingDependency: this Triton has no cuobjdump or nvdisasm.
    """
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        try:
            usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(file))
            sass = _output(knobs.nvidia.nvdisasm.path, "-c", str(file))
        except (OSError, RuntimeError) as error:
            raise MissingDependency(
                f"sm_90 needs cuobjdump and nvdisasm, which NVIDIA's Triton brings: {error}"
            ) from error
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if match is None:
        raise ValueError(f"cuobjdump -res-usage says nothing of registers: {usage!r}")
    registers, stack, _, local = (int(number) for number in match.groups())
    return Resources(registers, stack, local, shared_bytes, warps), sass


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


_MATRIX = re.compile(r"(HGMMA|QGMMA|HMMA|QMMA)\.(\d+x\d+x\d+|\d+)")
_HMMA_SIZES = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "16832": 16 * 8 * 32}
_ACCESS = re.compile(r"(LDGSTS|LDG|STG)(?:\.\w+)*")


def _count(counts: InstructionCounts, opcode: str, line: str) -> None:
    if matrix := _MATRIX.match(opcode):
        counts.matrix[opcode] += 1
        if matrix[1].endswith("GMMA"):
            rows, columns, depth = (int(size) for size in matrix[2].split("x"))
            counts.matrix_macs += rows * columns * depth
            counts.matrix_warps = 4
        else:
            counts.matrix_macs += _HMMA_SIZES[matrix[2]]
    elif access := _ACCESS.match(opcode):
        parts = opcode.split(".")
        width = 16 if "128" in parts else 8 if "64" in parts else 4
        width = 1 if {"U8", "S8"} & set(parts) else 2 if {"U16", "S16"} & set(parts) else width
        widths = counts.store_widths if access[1] == "STG" else counts.load_widths
        widths[width] += 1
    elif opcode.startswith(("UTMALDG", "UBLKCP")):
        counts.bulk_copies += 1
    elif opcode.startswith(("ATOMG", "RED.")):
        counts.atomics[opcode] += 1
    elif opcode.startswith(("DEPBAR", "LDGDEPBAR", "WARPGROUP.DEPBAR", "SYNCS")):
        counts.waits += 1
    elif opcode.startswith("BAR."):
        counts.barriers += 1
    elif opcode.startswith(("LDL", "STL")):
        counts.private += 1


SASS = Dialect(
    label=re.compile(r"^(\.L_x_\w+):"),
    branch=re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?BRA(?:\.\w+)* (?:!?U?P\d+, )?`\((\.L_x_\w+)\)"),
    opcode=re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[\dT]+ )?([A-Z][A-Z0-9_.a-z]*)"),
    count=_count,
)
