"""Which product a trace's GPU is, and what its memory can do."""

from __future__ import annotations

import re
from dataclasses import dataclass

from epfuse.hardware.time_model import MI300X, Machine
from epfuse.profiling.events import TracedDevice


@dataclass(frozen=True)
class Product:
    """A GPU that traces come from.

    Attributes:
        name: of the product.
        pattern: found in the name that CUDA reports.
        capability, multiprocessors, memory_gib: how a ROCm trace, which names no product, tells it: gfx target,
            compute units and at least this much memory.
        memory_bandwidth: peak, bytes a second, from the vendor's data sheet.
        machine: what the time model knows of it; None if it knows nothing.
    """

    name: str
    memory_bandwidth: float
    pattern: str = ""
    capability: tuple[int, int] = (0, 0)
    multiprocessors: int = 0
    memory_gib: int = 0
    machine: Machine | None = None


PRODUCTS = (
    Product("MI325X", 6.0e12, "MI325X", (9, 4), 304, 240),
    Product("MI300X", MI300X.memory_bandwidth, "MI300X", (9, 4), 304, 180, MI300X),
    Product("MI355X", 8.0e12, "MI35[05]X", (9, 5), 256, 270),
    Product("H200", 4.8e12, r"\bH200\b"),
    Product("H100 SXM", 3.35e12, r"\bH100 80GB HBM3\b"),
    Product("H100 PCIe", 2.0e12, r"\bH100 PCIe\b"),
    Product("B200", 8.0e12, r"\bB200\b"),
)


def product_of(device: TracedDevice) -> Product | None:
    """The product, by name or, where the trace has none, by what it says of the GPU; None if it is not known."""
    if device.name:
        return next((product for product in PRODUCTS if re.search(product.pattern, device.name)), None)
    return next(
        (
            product
            for product in PRODUCTS
            if product.multiprocessors
            and product.multiprocessors == device.multiprocessors
            and product.capability == device.capability
            and product.memory_gib <= device.memory_bytes / 2**30
        ),
        None,
    )
