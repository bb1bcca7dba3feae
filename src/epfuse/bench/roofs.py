"""Measure the device's roofs: how fast it reads memory and multiplies matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch

from epfuse.bench.measure import Measured, Sampling, TimingMethod, time_calls
from epfuse.bench.roofline import MatrixOperand, Roof, Roofs
from epfuse.target import Target, target_of

GPU_READ_BYTES = 1 << 30
"""Many times any cache."""
CPU_COPY_BYTES = 256 << 20
GPU_MATRIX = 8192
GPU_FP32_MATRIX = 4096
CPU_MATRIX = 1024

READ_SHAPES = ((2048, 4, 8), (4096, 4, 8), (8192, 2, 16))
"""Words of a step, steps of a program, warps: which is fastest depends on the GPU."""


def measure_roofs(device: torch.device, sampling: Sampling) -> Roofs:
    """The roofs of ``device``: medians, and of reading the fastest of several ways.

    Random operands: a GPU multiplies zeros faster, because that takes less power.
    """
    matmul = {operand: measure(device, sampling) for operand, measure in MATMULS.items()}
    return Roofs(_read(device, sampling), matmul)


def _roof(work: float, measured: Measured, method: str) -> Roof:
    timing = measured.timing
    return Roof(work / (timing.median_us * 1e-6), method, timing.spread_us / timing.median_us)


def _method(device: torch.device) -> TimingMethod:
    return TimingMethod.GRAPH if device.type == "cuda" else TimingMethod.PLAIN


def _read(device: torch.device, sampling: Sampling) -> Roof:
    if device.type == "cpu":
        source = torch.ones(CPU_COPY_BYTES, dtype=torch.uint8)
        target = torch.zeros_like(source)
        copied = time_calls([lambda: target.copy_(source)], device, sampling, TimingMethod.PLAIN)
        return _roof(2 * CPU_COPY_BYTES, copied, f"memcpy of {CPU_COPY_BYTES >> 20} MiB, bytes read and written")
    from epfuse.bench.kernel import read_kernel

    words = torch.randint(-(2**31), 2**31 - 1, (GPU_READ_BYTES // 4,), dtype=torch.int32, device=device)
    roofs = []
    for block, steps, warps in READ_SHAPES:
        programs = words.numel() // (block * steps)
        sums = torch.empty(programs, dtype=torch.int32, device=device)

        def read(
            programs: int = programs,
            sums: torch.Tensor = sums,
            block: int = block,
            steps: int = steps,
            warps: int = warps,
        ) -> torch.Tensor:
            read_kernel[(programs,)](words, sums, BLOCK=block, STEPS=steps, num_warps=warps)
            return sums

        read()
        measured = time_calls([read], device, sampling, TimingMethod.GRAPH)
        roofs.append(_roof(GPU_READ_BYTES, measured, f"a kernel that reads {GPU_READ_BYTES >> 30} GiB"))
    return max(roofs, key=lambda roof: roof.rate or 0.0)


def _bf16(device: torch.device, sampling: Sampling) -> Roof:
    return _product(device, sampling, GPU_MATRIX, torch.bfloat16)


def _fp32(device: torch.device, sampling: Sampling) -> Roof:
    return _product(device, sampling, GPU_FP32_MATRIX, torch.float32)


def _product(device: torch.device, sampling: Sampling, gpu_size: int, dtype: torch.dtype) -> Roof:
    """``[n, k] @ [m, k].T``, as a linear layer multiplies."""
    size = CPU_MATRIX if device.type == "cpu" else gpu_size
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b.T
    measured = time_calls([lambda: a @ b.T], device, sampling, _method(device))
    return _roof(2.0 * size**3, measured, f"torch.matmul, {size}^3, {str(dtype).removeprefix('torch.')}")


def _fp8(device: torch.device, sampling: Sampling) -> Roof:
    if device.type == "cpu":
        return Roof(None, "no FP8 path runs on a CPU")
    dtype = torch.float8_e4m3fnuz if target_of(device) is Target.GFX942 else torch.float8_e4m3fn
    size = GPU_MATRIX
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    one = torch.ones((), device=device)

    def product() -> torch.Tensor:
        return torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    try:
        product()
        measured = time_calls([product], device, sampling, _method(device))
    except RuntimeError as error:
        return Roof(None, f"torch._scaled_mm: {str(error).splitlines()[0]}")
    return _roof(2.0 * size**3, measured, f"torch._scaled_mm, {size}^3, {str(dtype).removeprefix('torch.')}")


MATMULS: dict[MatrixOperand, Callable[[torch.device, Sampling], Roof]] = {
    MatrixOperand.BF16: _bf16,
    MatrixOperand.FP8: _fp8,
    MatrixOperand.FP32: _fp32,
}
