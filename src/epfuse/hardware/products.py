"""The GPUs that can be planned for without having one: their kernels, and their machine in the time model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from epfuse.arguments import checks_enums
from epfuse.hardware import gpus
from epfuse.hardware.gpus import GPU
from epfuse.hardware.h100 import H100
from epfuse.hardware.time_model import BALANCED, MI300X, MI300X_ROUTING, Machine, RoutingModel
from epfuse.target import REFERENCE_DEVICE, Target

H200 = replace(
    H100,
    name="H200",
    memory_bandwidth=gpus.H200.memory_bandwidth,
    source="peak bandwidth: NVIDIA H200 SXM data sheet; the rest: taken over from the H100, not measured",
)
MI325X = replace(
    MI300X,
    name="MI325X",
    memory_bandwidth=gpus.MI325X.memory_bandwidth,
    source="peak bandwidth: AMD Instinct MI325X data sheet; the rest: taken over from the MI300X, not measured",
)


@checks_enums
@dataclass(frozen=True)
class Product:
    """One GPU that epfuse has kernels for.

    Attributes:
        gpu: its sizes.
        device_name: as torch names it; what tuned tables are keyed by.
        target: its kernels.
        machine: in the time model; None if nothing is calibrated.
        routing: how uneven the router was in the measurements that ``machine`` is fitted to.
    """

    gpu: GPU
    device_name: str
    target: Target
    machine: Machine | None
    routing: RoutingModel = BALANCED

    @property
    def hbm_bytes(self) -> int:
        """Its memory."""
        return self.gpu.memory_bytes


PRODUCTS = {
    "mi300x": Product(gpus.MI300X, REFERENCE_DEVICE[Target.GFX942], Target.GFX942, MI300X, MI300X_ROUTING),
    "mi325x": Product(gpus.MI325X, "AMD Instinct MI325X", Target.GFX942, MI325X, MI300X_ROUTING),
    "mi355x": Product(gpus.MI355X, REFERENCE_DEVICE[Target.GFX950], Target.GFX950, None),
    "h100": Product(gpus.H100, REFERENCE_DEVICE[Target.SM90], Target.SM90, H100),
    "h200": Product(gpus.H200, "NVIDIA H200", Target.SM90, H200),
}
"""By the names that people use; the first of a target stands for it."""


@checks_enums
def product_of(target: Target) -> Product:
    """The product that stands for ``target``; a GPU's."""
    return next(product for product in PRODUCTS.values() if product.target is target)
