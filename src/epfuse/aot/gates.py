"""What every compiled kernel must be like; a kernel that falls short is named, with its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from epfuse.aot import amdgcn, sass
from epfuse.aot.kernels import Kernel
from epfuse.arguments import checks_enums
from epfuse.target import Target

DECODE_ROWS = 16
"""Row blocks up to here belong to decode: they stream weights, and a second workgroup loads while the first waits."""


@dataclass(frozen=True)
class Gate:
    """One gate on all of a target's kernels.

    Attributes:
        name: of the gate.
        checked: kernels that it applies to.
        failures: one line for each that falls short.
    """

    name: str
    checked: int
    failures: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def detail(self) -> str:
        """The failures, or how many kernels passed."""
        return "; ".join(self.failures) if self.failures else f"{self.checked} kernels"

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail, "checked": self.checked}


@dataclass(frozen=True)
class GateRule:
    """One gate before it is applied.

    Attributes:
        name: of the gate.
        applies: to which kernels.
        shortfall: what is wrong with a kernel, with numbers; None if nothing is.
    """

    name: str
    applies: Callable[[Kernel], bool]
    shortfall: Callable[[Kernel], str | None]


@checks_enums
def check(target: Target, kernels: Sequence[Kernel]) -> list[Gate]:
    """Every gate of ``target`` on ``kernels``."""
    gates = []
    for rule in AMD_RULES if target.is_amd else NVIDIA_RULES:
        chosen = [kernel for kernel in kernels if rule.applies(kernel)]
        found = [(kernel, rule.shortfall(kernel)) for kernel in chosen]
        failures = tuple(f"{kernel.name}: {shortfall}" for kernel, shortfall in found if shortfall)
        gates.append(Gate(rule.name, len(chosen), failures))
    return gates


def _any(kernel: Kernel) -> bool:
    return True


def _gemm(kernel: Kernel) -> bool:
    return kernel.tile is not None


def _tensor_core_gemm(kernel: Kernel) -> bool:
    # Hopper has no FP32 tensor cores; that path is for correctness
    return kernel.tile is not None and kernel.weight_type != "*fp32"


def _decode(kernel: Kernel) -> bool:
    return kernel.tile is not None and kernel.tile.block_m <= DECODE_ROWS


def _fp8_rows(kernel: Kernel) -> bool:
    return kernel.tile is not None and (kernel.row_type or "").startswith("*fp8")


def _spills(kernel: Kernel) -> str | None:
    r = kernel.resources
    assert isinstance(r, amdgcn.Resources)
    if r.vgpr_spills or r.sgpr_spills:
        return f"{r.vgpr_spills} VGPRs and {r.sgpr_spills} SGPRs spilled"
    return None


def _scratch(kernel: Kernel) -> str | None:
    r = kernel.resources
    assert isinstance(r, amdgcn.Resources)
    return f"{r.scratch_bytes} bytes of scratch a lane" if r.scratch_bytes else None


def _lds(kernel: Kernel) -> str | None:
    r, most = kernel.resources, amdgcn.LDS[kernel.launch.target].bytes
    assert isinstance(r, amdgcn.Resources)
    return f"{r.lds_bytes} bytes of LDS; a compute unit has {most}" if r.lds_bytes > most else None


def _shared(kernel: Kernel) -> str | None:
    r, most = kernel.resources, sass.MOST_SHARED_BYTES
    assert isinstance(r, sass.Resources)
    return f"{r.shared_bytes} bytes of shared memory; a block may have {most}" if r.shared_bytes > most else None


def _matrix(kernel: Kernel) -> str | None:
    if kernel.loop is None:
        return "no matrix instructions in a loop"
    steps = kernel.steps_by_matrix()
    if steps < 1 or steps != int(steps):
        return f"a turn of the main loop multiplies {steps:g} K steps; all products belong there, each once"
    # what is multiplied was loaded in the same turn, so a product that several waves make shows as too many steps
    if not kernel.is_specialised and steps > (loads := kernel.steps_by_loads(width=1)):
        return f"a turn of the main loop multiplies {steps:g} K steps and loads {loads:.2f}"
    return None


def _wide_loads(kernel: Kernel) -> str | None:
    if kernel.loop is None:
        return "no main loop"
    if kernel.is_specialised:
        return None if kernel.counts.load_widths[16] or kernel.counts.bulk_copies else "no 16-byte copies at all"
    steps, wide = kernel.steps_by_matrix(), kernel.steps_by_loads(16)
    if wide < steps:
        widths = {f"{width} B": count for width, count in sorted(kernel.loop.load_widths.items())}
        return f"16-byte loads fetch {wide:.2f} of {steps:g} K steps of weights (loads of a lane: {widths})"
    return None


def _two_workgroups(kernel: Kernel) -> str | None:
    seen, r = kernel.occupancy, kernel.resources
    assert isinstance(seen, amdgcn.Occupancy)
    assert isinstance(r, amdgcn.Resources)
    if seen.workgroups_per_cu >= 2:
        return None
    return (
        f"{seen.workgroups_per_cu} workgroup on a compute unit, limited by {' and '.join(seen.limits)}"
        f" ({r.lds_bytes} bytes of LDS, {r.vgprs}+{r.agprs} registers, {r.waves} waves)"
    )


def _fp8_matrix(kernel: Kernel) -> str | None:
    kinds = dict(kernel.loop.matrix) if kernel.loop else {}
    types = {kernel.row_type, kernel.weight_type}
    if not kinds or not all("fp8_fp8" in kind or "f8f6f4" in kind for kind in kinds):
        return f"multiplies with {kinds or 'nothing'}, not with FP8 MFMA"
    needed = "*fp8e4b8" if kernel.launch.target is Target.GFX942 else "*fp8e4nv"
    if types != {needed}:
        return f"reads {' and '.join(sorted(map(str, types)))}; the matrix cores multiply {needed}"
    return None


def _spills_in_loop(kernel: Kernel) -> str | None:
    if kernel.loop is not None and kernel.loop.private:
        return f"{kernel.loop.private} accesses of local memory in the main loop"
    return None


AMD_RULES = (
    GateRule("no spills", _any, _spills),
    GateRule("no scratch", _any, _scratch),
    GateRule("LDS fits", _any, _lds),
    GateRule("MFMA in the main loop", _gemm, _matrix),
    GateRule("16-byte weight loads", _gemm, _wide_loads),
    GateRule("two workgroups a CU at decode", _decode, _two_workgroups),
    GateRule("FP8 MFMA, FNUZ on gfx942", _fp8_rows, _fp8_matrix),
)
NVIDIA_RULES = (
    GateRule("no spills in the main loop", _any, _spills_in_loop),
    GateRule("shared memory fits", _any, _shared),
    GateRule("wgmma or mma in the main loop", _tensor_core_gemm, _matrix),
    GateRule("16-byte weight copies", _tensor_core_gemm, _wide_loads),
)
