"""Whether the matrices of a layer are of one kind and size: what `ExpertWeights` asks, however it is made."""

from __future__ import annotations

import torch

from epfuse.errors import ConfigError, DeviceError, DtypeError, LayoutError, ShapeError
from epfuse.numerics.mxfp8 import MXFP8, ScaleLayout
from epfuse.weights.block_fp8 import BlockFP8
from epfuse.weights.fragment import FragmentMXFP8
from epfuse.weights.panels import PanelStack, RowOrder
from epfuse.weights.row_fp8 import RowFP8

KINDS: dict[str, type[torch.Tensor | MXFP8 | FragmentMXFP8 | RowFP8 | BlockFP8]] = {
    "dense_experts": torch.Tensor,
    "mxfp8_experts": MXFP8,
    "fragment_experts": FragmentMXFP8,
    "row_fp8_experts": RowFP8,
    "block_fp8_experts": BlockFP8,
}
"""The fields of `ExpertWeights` and what their matrices are."""


def check_stack(name: str, stack: object, kind: type[object], shape: tuple[int, int, int]) -> None:
    """Refuse a stack of another kind or size than a field is for.

    Raises:
        ConfigError, ShapeError: as said.
    """
    if not isinstance(stack, kind):
        raise ConfigError(f"{name} is a {type(stack).__name__}; it must be a {kind.__name__}")
    found: tuple[int, ...]
    if isinstance(stack, PanelStack):
        found = (stack.codes.shape[0], stack.rows, stack.columns)
    else:
        assert isinstance(stack, torch.Tensor | MXFP8 | BlockFP8)
        found = tuple(stack.shape)
    if found != shape:
        raise ShapeError(f"{name} has shape {found}; it must be {shape}, as L, H and I say")


def check_pair(name: str, w13: object, w2: object) -> None:
    """Refuse two projections whose bytes don't mean the same, or lie in orders that no kernel reads.

    Raises:
        DeviceError, DtypeError, LayoutError: as said.
    """
    if isinstance(w13, PanelStack) and isinstance(w2, PanelStack):
        if (w13.order, w2.order) != (RowOrder.GATE_UP, RowOrder.PLAIN):
            orders = f"{w13.order.name} and {w2.order.name}"
            raise LayoutError(f"{name} has rows in the orders {orders}; they must be GATE_UP and PLAIN")
        first, second = w13.codes, w2.codes
    elif isinstance(w13, torch.Tensor) and isinstance(w2, torch.Tensor):
        first, second = w13, w2
    else:
        assert isinstance(w13, MXFP8 | BlockFP8)
        assert isinstance(w2, MXFP8 | BlockFP8)
        for stack in (w13, w2):
            if isinstance(stack, MXFP8) and stack.layout is not ScaleLayout.ROWS:
                raise LayoutError(f"{name} has scales in layout PACKED; they must be in ROWS (MXFP8.with_layout)")
        first, second = w13.values, w2.values
    if first.dtype != second.dtype:
        raise DtypeError(f"{name}.w13 is in {first.dtype} and w2 in {second.dtype}; both must have one dtype")
    if first.device != second.device:
        raise DeviceError(f"{name}.w13 is on {first.device} and w2 on {second.device}; both must be on one device")
