"""Every gate passes a good kernel and names a bad one, with its numbers."""

from __future__ import annotations

import pytest

from epfuse.aot.gates import check
from epfuse.aot.kernels import Kernel
from epfuse.target import Target
from tests.aot.kernels import FP8_MFMA, amd_gemm, nvidia_gemm, nvidia_specialised


def failures(target: Target, kernel: Kernel) -> dict[str, str]:
    return {gate.name: gate.detail for gate in check(target, [kernel]) if not gate.ok}


def test_good_kernels_pass() -> None:
    assert failures(Target.GFX942, amd_gemm()) == {}
    assert failures(Target.SM90, nvidia_gemm()) == {}
    assert failures(Target.SM90, nvidia_specialised()) == {}
    fnuz = amd_gemm(rows="*fp8e4b8", weights="*fp8e4b8", matrix=FP8_MFMA, products=4, loads={16: 2, 8: 1})
    assert failures(Target.GFX942, fnuz) == {}


@pytest.mark.parametrize(
    ("gate", "numbers", "kernel"),
    [
        ("no spills", "40 VGPRs and 0 SGPRs spilled", amd_gemm(vgpr_spills=40)),
        ("no scratch", "140 bytes of scratch", amd_gemm(scratch_bytes=140)),
        ("LDS fits", "65537 bytes of LDS; a compute unit has 65536", amd_gemm(lds_bytes=65537)),
        ("MFMA in the main loop", "no matrix instructions", amd_gemm(products=0)),
        ("MFMA in the main loop", "multiplies 0.75 K steps", amd_gemm(products=6)),
        # four waves that all make the same products
        ("MFMA in the main loop", "multiplies 4 K steps and loads 1.25", amd_gemm(products=32)),
        ("16-byte weight loads", "fetch 0.00 of 1 K steps", amd_gemm(loads={8: 10})),
        (
            "two workgroups a CU at decode",
            "1 workgroup on a compute unit, limited by lds (36864",
            amd_gemm(lds_bytes=36864),
        ),
        (
            "FP8 MFMA, FNUZ on gfx942",
            "not with FP8 MFMA",
            amd_gemm(rows="*fp8e4b8", weights="*fp8e4b8", loads={16: 5}),
        ),
        (
            "FP8 MFMA, FNUZ on gfx942",
            "reads *fp8e4nv; the matrix cores multiply *fp8e4b8",
            amd_gemm(rows="*fp8e4nv", weights="*fp8e4nv", matrix=FP8_MFMA, products=4),
        ),
    ],
)
def test_a_short_amd_kernel_is_named(gate: str, numbers: str, kernel: Kernel) -> None:
    detail = failures(Target.GFX942, kernel)[gate]
    assert detail.startswith(f"{kernel.name}: ")
    assert numbers in detail


@pytest.mark.parametrize(
    ("gate", "numbers", "kernel"),
    [
        ("no spills in the main loop", "3 accesses", nvidia_gemm(private=3)),
        ("shared memory fits", "a block may have 232448", nvidia_gemm(shared_bytes=240000)),
        ("16-byte weight copies", "fetch 0.00 of 1", nvidia_gemm(loads={4: 80})),
    ],
)
def test_a_short_nvidia_kernel_is_named(gate: str, numbers: str, kernel: Kernel) -> None:
    detail = failures(Target.SM90, kernel)[gate]
    assert detail.startswith("gate_up bf16 16x128x128 4w 3s: ")
    assert numbers in detail


def test_a_kernel_with_a_producer_has_a_tile() -> None:
    assert nvidia_specialised().name == "gate_up_down w8a16 144x192x128 4w 3s"
    detail = failures(Target.SM90, nvidia_specialised(products=6))
    assert "multiplies 0.75 K steps" in detail["wgmma or mma in the main loop"]
    detail = failures(Target.SM90, nvidia_specialised(copies=0))
    assert "no 16-byte copies at all" in detail["16-byte weight copies"]


def test_names() -> None:
    assert amd_gemm().name == "gate_up bf16 16x64x128 4w 2s"
    assert amd_gemm(weights="*fp8e4b8").name == "gate_up bf16 fp8e4b8 16x64x128 4w 2s"


def test_one_workgroup_is_enough_at_prefill() -> None:
    tall = amd_gemm(block_m=32, lds_bytes=36864, products=16)
    assert failures(Target.GFX942, tall) == {}
