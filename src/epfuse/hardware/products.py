"""The GPUs that can be planned for without having one: their memory, and their machine in the time model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from epfuse.arguments import checks_enums
from epfuse.hardware.h100 import H100
from epfuse.hardware.time_model import BALANCED, MI300X, MI300X_ROUTING, Machine, Routing
from epfuse.target import REFERENCE_DEVICE, Target

GIB = 1 << 30

H200 = replace(
    H100,
    name="H200",
    memory_bandwidth=4.8e12,
    source="peak bandwidth: NVIDIA H200 SXM data sheet; the rest: taken over from the H100, not measured",
)
MI325X = replace(
    MI300X,
    name="MI325X",
    memory_bandwidth=6.0e12,
    source="peak bandwidth: AMD Instinct MI325X data sheet; the rest: taken over from the MI300X, not measured",
)


@checks_enums
@dataclass(frozen=True)
class Product:
    """One GPU.

    Attributes:
        device_name: as torch names it; what tuned tables are keyed by.
        target: its kernels.
        hbm_bytes: its memory (the vendor's data sheet).
        machine: in the time model; None if nothing is calibrated.
        routing: how uneven the router was in the measurements that ``machine`` is fitted to.
    """

    device_name: str
    target: Target
    hbm_bytes: int
    machine: Machine | None
    routing: Routing = BALANCED


PRODUCTS = {
    "mi300x": Product(REFERENCE_DEVICE[Target.GFX942], Target.GFX942, 192 * GIB, MI300X, MI300X_ROUTING),
    "mi325x": Product("AMD Instinct MI325X", Target.GFX942, 256 * GIB, MI325X, MI300X_ROUTING),
    "mi355x": Product(REFERENCE_DEVICE[Target.GFX950], Target.GFX950, 288 * GIB, None),
    "h100": Product(REFERENCE_DEVICE[Target.SM90], Target.SM90, 80 * GIB, H100),
    "h200": Product("NVIDIA H200", Target.SM90, 141 * 10**9, H200),
}
"""By the names that people use; the first of a target stands for it."""


@checks_enums
def product_of(target: Target) -> Product:
    """The product that stands for ``target``; a GPU's."""
    return next(product for product in PRODUCTS.values() if product.target is target)
