"""The GPUs that epfuse knows without having one, by what vendors' data sheets and traces say of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from epfuse.hardware.h100 import H100 as H100_MACHINE
from epfuse.hardware.time_model import MI300X as MI300X_MACHINE

GIB = 1 << 30
REPORTED_MEMORY = 15 / 16
"""ROCm reports at least this part of a GPU's memory."""


@dataclass(frozen=True)
class GPU:
    """One GPU.

    Attributes:
        name: of the product.
        memory_bandwidth: peak, bytes a second.
        memory_bytes: all of its memory.
        pattern: a regular expression, found in the name that a driver reports.
        gfx: the gfx target and the number of compute units, by which a ROCm trace, which has no names, tells it.
    """

    name: str
    memory_bandwidth: float
    memory_bytes: int
    pattern: str
    gfx: tuple[tuple[int, int], int] | None = None


MI300X = GPU("MI300X", MI300X_MACHINE.memory_bandwidth, 192 * GIB, "MI300X", ((9, 4), 304))
MI325X = GPU("MI325X", 6.0e12, 256 * GIB, "MI325X", ((9, 4), 304))
MI355X = GPU("MI355X", 8.0e12, 288 * GIB, "MI35[05]X", ((9, 5), 256))
H100 = GPU("H100 SXM", H100_MACHINE.memory_bandwidth, 80 * GIB, r"\bH100 80GB HBM3\b")
H100_PCIE = GPU("H100 PCIe", 2.0e12, 80 * GIB, r"\bH100 PCIe\b")
H200 = GPU("H200", 4.8e12, 141 * 10**9, r"\bH200\b")
B200 = GPU("B200", 8.0e12, 180 * 10**9, r"\bB200\b")

GPUS = (MI300X, MI325X, MI355X, H100, H100_PCIE, H200, B200)


def named(name: str) -> GPU | None:
    """The GPU that a driver calls ``name``; None if it is not known, or a slice of one (MIG), which has less of all."""
    if " MIG " in name:
        return None
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, name)), None)


def seen_by_rocm(capability: tuple[int, int], compute_units: int, memory_bytes: int) -> GPU | None:
    """The GPU that ROCm describes so: of those that fit the one with the most memory; None if it is not known."""
    fitting = [
        gpu
        for gpu in GPUS
        if gpu.gfx == (capability, compute_units) and gpu.memory_bytes * REPORTED_MEMORY <= memory_bytes
    ]
    return max(fitting, key=lambda gpu: gpu.memory_bytes, default=None)
