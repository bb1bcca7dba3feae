"""FP8Rows: activations quantised row by row, values and scales together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from epfuse.errors import DeviceError, DtypeError, LayoutError, ShapeError
from epfuse.numerics.e8m0 import as_e8m0_bytes, decode_scales
from epfuse.numerics.mxfp8 import MXFP8, VALUE_DTYPES
from epfuse.stages.grid import pieces
from epfuse.weights.block_fp8 import BlockFP8, scale_block


@dataclass(frozen=True)
class FP8Rows:
    """Rows of E4M3 values with one E8M0 scale byte per run of ``group`` values; the last run may be shorter.

    With a group of 32 this is MXFP8. A group of 128 goes with block FP8 weights, whose scales cover 128 columns.

    Args:
        values: ``[N, K]``, float8_e4m3fn, or float8_e4m3fnuz for gfx94x; those of a row adjacent, rows a multiple of K
            apart.
        scales: ``[N, ceil(K / group)]`` contiguous uint8, or float8_e8m0fnu (kept as uint8).
        group: values that share a scale.

    Raises:
        ShapeError, DtypeError, DeviceError, LayoutError: the two don't fit together.
    """

    values: torch.Tensor
    scales: torch.Tensor
    group: int

    def __post_init__(self) -> None:
        if self.values.dtype not in VALUE_DTYPES:
            raise DtypeError(f"values has dtype {self.values.dtype}; FP8 rows are float8_e4m3fn or float8_e4m3fnuz")
        object.__setattr__(self, "scales", as_e8m0_bytes("scales", self.scales))
        if self.values.dim() != 2:
            raise ShapeError(f"values has shape {tuple(self.values.shape)}; FP8 rows are [N, K]")
        rows, columns = self.values.shape
        needed = (rows, pieces(columns, self.group))
        if tuple(self.scales.shape) != needed:
            raise ShapeError(
                f"scales has shape {tuple(self.scales.shape)}; beside values {tuple(self.values.shape)} in groups of"
                f" {self.group} it must be {needed}"
            )
        if self.scales.device != self.values.device:
            raise DeviceError(
                f"scales is on {self.scales.device} and values on {self.values.device}; both must be on one device"
            )
        strides = self.values.stride()
        if not self.values.is_contiguous() and (strides[1] != 1 or strides[0] % columns):
            raise LayoutError(
                f"values has strides {strides}; rows must be contiguous and a multiple of {columns} apart"
            )
        if not self.scales.is_contiguous():
            raise LayoutError(f"scales has strides {self.scales.stride()}; it must be contiguous")

    @classmethod
    def empty(cls, rows: int, columns: int, group: int, dtype: torch.dtype, device: torch.device) -> FP8Rows:
        """Uninitialised rows.

        Args:
            rows: N.
            columns: K, values of a row.
            group: values that share a scale.
            dtype: float8_e4m3fn or float8_e4m3fnuz.
            device: where they live.
        """
        return cls(
            torch.empty(rows, columns, dtype=dtype, device=device),
            torch.empty(rows, pieces(columns, group), dtype=torch.uint8, device=device),
            group,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``[N, K]`` numbers; float64 is exact, float32 wherever the product is in its range."""
        scales = decode_scales(self.scales, dtype).repeat_interleave(self.group, 1)
        return self.values.to(dtype) * scales[:, : self.values.shape[1]]


def require_alike(name: str, rows: FP8Rows, weights: MXFP8 | BlockFP8) -> None:
    """Refuse rows whose bytes a kernel would take for others beside these weights.

    Raises:
        DtypeError: E4M3FN beside E4M3FNUZ.
        ShapeError: scales of other groups.
        LayoutError: rows are apart.
    """
    if not rows.values.is_contiguous():
        raise LayoutError(f"{name} has strides {rows.values.stride()}; it must be contiguous")
    ours, theirs = rows.values.dtype, weights.values.dtype
    if ours != theirs:
        raise DtypeError(f"{name} has dtype {ours} and the weights {theirs}; both must have one")
    group = scale_block(weights)[1]
    if rows.group != group:
        raise ShapeError(f"{name} has groups of {rows.group}; beside these weights they must be of {group}")
