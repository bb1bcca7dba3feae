"""What a launcher guarantees of a pointer, so that a kernel's code does not depend on where a tensor happens to lie.

Triton compiles a kernel anew for a pointer that is not at a multiple of 16 bytes, and on AMD for one whose tensor's
*storage* exceeds 2 GiB, which of a view says nothing. `fused_experts` copies operands that begin elsewhere (`aligned`),
and launchers give AMD's compiler the bytes that a kernel can address (`extents`), which follow from the call's sizes.
"""

from __future__ import annotations

from typing import Any

import torch

from epfuse.target import Target

ALIGNMENT = 16
"""Bytes: what kernels load and store at a time."""
ADDRESSABLE = 2**31 - 1
"""Bytes that AMD's buffer instructions can address from a pointer."""


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor, copied where it begins at no multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


class Extent:
    """A tensor's pointer and bytes, as Triton asks for them."""

    __slots__ = ("dtype", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor = tensor
        self.dtype: torch.dtype = tensor.dtype

    def data_ptr(self) -> int:
        """The address of the first byte."""
        return self.tensor.data_ptr()

    def ptr_range(self) -> int:
        """The bytes that are addressed from there."""
        return self.tensor.nbytes


def extents(target: Target, *tensors: torch.Tensor) -> tuple[Any, ...]:
    """Tensors that grow with a call, as its kernels take them: on AMD by their own bytes, not their storage's."""
    return tuple(Extent(tensor) for tensor in tensors) if target.is_amd else tensors
