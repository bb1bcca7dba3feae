"""Resources, occupancy and instructions of AMD kernels, from the compiler's assembly.

Occupancy follows LLVM's AMDGPU backend (``AMDGPUBaseInfo.cpp``, ``GCNSubtarget.cpp``) and AMD's CDNA3 ISA guide: a CU
has 4 SIMDs, a SIMD 512 registers a lane, VGPRs and AGPRs in one file, dealt out in eights, and at most 8 waves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from epfuse.aot.assembly import Dialect, InstructionCounts
from epfuse.arguments import checks_enums
from epfuse.target import Target

SIMDS = 4
MOST_WAVES = 8
REGISTERS = 512
REGISTER_STEP = 8
LANES = 64
MOST_WORKGROUPS = 16
"""Of several waves on a compute unit: it has 16 barriers."""
FEW_SGPRS = 100
"""Up to here 8 waves fit the 800 scalar registers of a SIMD, above it 7."""


@dataclass(frozen=True)
class LocalMemory:
    """LDS of a compute unit: bytes, and the step in which they are dealt out."""

    bytes: int
    step: int


LDS = {Target.GFX942: LocalMemory(64 * 1024, 512), Target.GFX950: LocalMemory(160 * 1024, 1280)}
"""64 KiB (CDNA3 ISA guide) and 160 KiB (CDNA4 ISA guide)."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes.

    Attributes:
        vgprs, agprs, sgprs: registers of a lane or a wave; vgprs are without the AGPRs.
        vgpr_spills, sgpr_spills: registers that were spilled.
        scratch_bytes: private memory of a lane.
        lds_bytes: of a workgroup.
        waves: of a workgroup.
    """

    vgprs: int
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch_bytes: int
    lds_bytes: int
    waves: int


@dataclass(frozen=True)
class Occupancy:
    """How many of a kernel's workgroups a compute unit holds.

    Attributes:
        workgroups_per_cu: at most.
        waves_per_simd: of those workgroups; below 1 if they don't reach every SIMD.
        register_waves: waves of a SIMD that the registers alone would allow.
        limits: what allows no more: "lds", "registers", "waves".
    """

    workgroups_per_cu: int
    waves_per_simd: float
    register_waves: int
    limits: tuple[str, ...]


def register_waves(resources: Resources) -> int:
    """Waves of a SIMD that fit its registers."""
    # AGPRs begin at a multiple of four
    vgprs = -(-resources.vgprs // 4) * 4 if resources.agprs else resources.vgprs
    total = max(vgprs + resources.agprs, 1)
    waves = min(REGISTERS // (-(-total // REGISTER_STEP) * REGISTER_STEP), MOST_WAVES)
    return min(waves, MOST_WAVES if resources.sgprs <= FEW_SGPRS else MOST_WAVES - 1)


@checks_enums
def occupancy(resources: Resources, target: Target) -> Occupancy:
    """Workgroups that fit a compute unit of ``target``."""
    lds = LDS[target]
    waves = register_waves(resources)
    # a workgroup's waves are dealt out evenly over the SIMDs
    per_simd = -(-resources.waves // SIMDS)
    fits = {
        "registers": waves // per_simd if resources.waves >= SIMDS else waves * SIMDS // resources.waves,
        "waves": min(
            MOST_WAVES * SIMDS // resources.waves, MOST_WORKGROUPS if resources.waves > 1 else MOST_WAVES * SIMDS
        ),
    }
    if resources.lds_bytes:
        fits["lds"] = lds.bytes // (-(-resources.lds_bytes // lds.step) * lds.step)
    workgroups = min(fits.values())
    limits = tuple(sorted(name for name, number in fits.items() if number == workgroups))
    return Occupancy(workgroups, workgroups * resources.waves / SIMDS, waves, limits)


def resources_of(assembly: str, lds_bytes: int, waves: int) -> Resources:
    """Resources from the code object's metadata, which the assembly ends with.

    Args:
        assembly: of the kernel.
        lds_bytes: what Triton asks for at the launch; the code object says 0.
        waves: of a workgroup.
    """

    def field(name: str) -> int:
        match = re.search(rf"^[\s-]*\.{name}:\s+(\d+)\s*$", assembly, re.MULTILINE)
        if match is None:
            raise ValueError(f"the assembly has no .{name}")
        return int(match[1])

    total, agprs = field("vgpr_count"), field("agpr_count")
    accum = re.search(r"^\s*\.amdhsa_accum_offset\s+(\d+)", assembly, re.MULTILINE)
    # .vgpr_count counts AGPRs too, which begin at the accumulator offset
    vgprs = min(total, int(accum[1])) if accum and agprs else total
    return Resources(
        vgprs=vgprs,
        agprs=agprs,
        sgprs=field("sgpr_count"),
        vgpr_spills=field("vgpr_spill_count"),
        sgpr_spills=field("sgpr_spill_count"),
        scratch_bytes=field("private_segment_fixed_size"),
        lds_bytes=lds_bytes + field("group_segment_fixed_size"),
        waves=waves,
    )


_WIDTHS = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2}
_ACCESS = re.compile(
    r"(global|buffer|flat)_(load|store)_(?:lds_)?(u?s?byte|u?s?short|dword)(?:x(\d))?(?:_d16)?(?:_hi)?"
)
_MATRIX = re.compile(r"v_mfma_(?:scale_)?[a-z]+\d+_(\d+)x(\d+)x(\d+)")
_ATOMIC = re.compile(r"(global|buffer|flat)_atomic_")


def _count(counts: InstructionCounts, opcode: str, line: str) -> None:
    if matrix := _MATRIX.match(opcode):
        rows, columns, depth = (int(size) for size in matrix.groups())
        counts.matrix[opcode] += 1
        counts.matrix_macs += rows * columns * depth
    elif opcode.startswith("v_"):
        counts.vector += 1
    elif access := _ACCESS.match(opcode):
        width = _WIDTHS.get(access[3], 4 * int(access[4] or 1))
        widths = counts.load_widths if access[2] == "load" else counts.store_widths
        widths[width] += 1
    elif _ATOMIC.match(opcode):
        counts.atomics[opcode] += 1
    elif opcode == "s_waitcnt":
        counts.waits += 1
    elif opcode == "s_barrier":
        counts.barriers += 1
    elif opcode.startswith("scratch_"):
        counts.private += 1


AMDGCN = Dialect(
    label=re.compile(r"^(\.L\w+):"),
    branch=re.compile(r"^\s+s_c?branch\w*\s+(\.L\w+)"),
    opcode=re.compile(r"^\s+([a-z]\w+)"),
    count=_count,
)
