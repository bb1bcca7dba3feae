"""Compiled kernels that were never compiled, for tests of what is made of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from epfuse.aot import amdgcn, sass
from epfuse.aot.assembly import InstructionCounts
from epfuse.aot.kernels import Kernel, KernelUse
from epfuse.aot.launches import Launch
from epfuse.target import Target

MFMA = "v_mfma_f32_16x16x16_bf16"
FP8_MFMA = "v_mfma_f32_16x16x32_fp8_fp8"


def amd_gemm(
    *,
    target: Target = Target.GFX942,
    rows: str = "*bf16",
    weights: str = "*bf16",
    matrix: str = MFMA,
    products: int = 8,
    loads: dict[int, int] | None = None,
    block_m: int = 16,
    **resources: Any,
) -> Kernel:
    """gate_up in a tile of 16 x 64 x 128 with 4 waves; as good as it can be unless something is said."""
    launch = Launch(
        target=target,
        module="epfuse.stages.gate_up.kernel",
        kernel="gate_up_kernel",
        signature=(("x", rows), ("w13", weights)),
        constants=(("BLOCK_M", block_m), ("BLOCK_N", 64), ("BLOCK_K", 128), ("EVEN_K", True)),
        attributes=(),
        options=(("num_warps", 4), ("num_stages", 2)),
    )
    whole = {"vgprs": 74, "agprs": 0, "sgprs": 36, "vgpr_spills": 0, "sgpr_spills": 0}
    whole |= {"scratch_bytes": 0, "lds_bytes": 20480, "waves": 4}
    taken = amdgcn.Resources(**(whole | resources))
    depth = 32 if "x32_" in matrix else 16
    loop = InstructionCounts(
        matrix=Counter({matrix: products}),
        matrix_macs=products * 16 * 16 * depth,
        load_widths=Counter({16: 5} if loads is None else loads),
        vector=5,
    )
    use = KernelUse(("bf16",), ("bf16",), ("minimax-m3",), (1, 256))
    return Kernel(launch, use, taken, amdgcn.occupancy(taken, target), loop, loop if products else None)


def nvidia_gemm(*, loads: dict[int, int] | None = None, private: int = 0, shared_bytes: int = 81920) -> Kernel:
    """gate_up in a Hopper tile of 16 x 128 x 128 with 4 warps."""
    launch = Launch(
        target=Target.SM90,
        module="epfuse.stages.gate_up.kernel_sm90",
        kernel="gate_up_sm90_kernel",
        signature=(("x", "*bf16"), ("w13", "*bf16")),
        constants=(("BLOCK_M", 16), ("BLOCK_N", 128), ("BLOCK_K", 128), ("STAGES", 3)),
        attributes=(),
        options=(("num_warps", 4), ("num_stages", 3)),
    )
    taken = sass.Resources(72, 0, 0, shared_bytes, 4)
    loop = InstructionCounts(
        matrix=Counter({"HGMMA.64x16x16.F32.BF16": 16}),
        matrix_macs=16 * 64 * 16 * 16,
        matrix_warps=4,
        load_widths=Counter({16: 18} if loads is None else loads),
        private=private,
    )
    use = KernelUse(("bf16",), ("bf16",), ("minimax-m3",), (65, 256))
    return Kernel(launch, use, taken, sass.occupancy(taken), loop, loop)


def nvidia_specialised(*, products: int = 8, copies: int = 5) -> Kernel:
    """gate_up_down in a tile of 144 x 192 x 128: three consumers of four warps, and a producer."""
    launch = Launch(
        target=Target.SM90,
        module="epfuse.stages.gate_up_down.kernel_sm90",
        kernel="gate_up_down_sm90_kernel",
        signature=(),
        constants=(("BLOCK_M", 144), ("BLOCK_K", 128), ("CONSUMERS", 3), ("STAGES", 3)),
        attributes=(),
        options=(("num_warps", 4), ("num_stages", 3)),
    )
    taken = sass.Resources(128, 0, 0, 192632, 16)
    loop = InstructionCounts(
        matrix=Counter({"HGMMA.64x128x16.F32.BF16": products, "HGMMA.64x16x16.F32.BF16": products}),
        matrix_macs=products * 64 * 144 * 16,
        matrix_warps=4,
        load_widths=Counter({4: 2}),
        bulk_copies=copies,
    )
    use = KernelUse(("w8a16",), ("bf16",), ("minimax-m3",), (2290, 4239))
    return Kernel(launch, use, taken, sass.occupancy(taken), loop, loop)
