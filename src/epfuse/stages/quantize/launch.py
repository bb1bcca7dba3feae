"""Launch the quantise kernel."""

from __future__ import annotations

import torch

from epfuse.errors import DeviceError, DtypeError, LayoutError, ShapeError
from epfuse.numerics.mxfp8 import BLOCK, SOURCE_DTYPES, VALUE_DTYPES
from epfuse.stages.extent import extents
from epfuse.stages.grid import pieces, power_of_two
from epfuse.stages.quantize.kernel import quantize_kernel
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.target import target_of

_VALUES = 1024  # of a program: with 4 warps, a lane loads 16 bytes of BF16 (8 with 4 waves of 64)


def launch_quantize(
    x: torch.Tensor,
    group: int = BLOCK,
    dtype: torch.dtype = torch.float8_e4m3fn,
    out: FP8Rows | None = None,
) -> FP8Rows:
    """Quantise activations per token and ``group`` values; bitwise what `epfuse.stages.quantize.reference` gives.

    Args:
        x: ``[T, K]`` bfloat16, float16 or float32; K a multiple of 32, values of a row adjacent, any row stride.
        group: values that share a scale: 32 for MXFP8, 128 for block FP8; a power of two.
        dtype: float8_e4m3fn, or float8_e4m3fnuz: the same numbers, for gfx94x.
        out: ``[T, K]`` of ``dtype`` in such groups; every byte is written. Allocated if None.

    Returns:
        ``out``.

    Raises:
        ShapeError: x is not ``[T, K]`` with K a multiple of 32, or out has another shape or group.
        DtypeError: x or out has another dtype.
        DeviceError: out is on another device than x.
        LayoutError: values of a row of x are not adjacent.

    Host syncs: none; graph-capturable; bitwise repeatable.
    """
    if x.dim() != 2 or x.shape[1] % BLOCK:
        raise ShapeError(f"x has shape {tuple(x.shape)}; it must be [T, K] with K a multiple of {BLOCK}")
    if x.dtype not in SOURCE_DTYPES:
        raise DtypeError(f"x has dtype {x.dtype}; FP8 rows are made from bfloat16, float16 or float32")
    if dtype not in VALUE_DTYPES:
        raise DtypeError(f"dtype is {dtype}; it must be float8_e4m3fn or float8_e4m3fnuz")
    tokens, size = x.shape
    if x.stride(1) != 1 and x.numel():
        raise LayoutError(f"x has strides {x.stride()}; the values of a row must be adjacent")
    if out is None:
        out = FP8Rows.empty(tokens, size, group, dtype, x.device)
    elif out.values.shape != x.shape or out.group != group:
        raise ShapeError(
            f"out has shape {tuple(out.values.shape)} in groups of {out.group}; it must be x's {tuple(x.shape)} in"
            f" groups of {group}"
        )
    elif out.values.dtype != dtype:
        raise DtypeError(f"out has dtype {out.values.dtype}; it must be {dtype}")
    elif out.values.device != x.device:
        raise DeviceError(f"out is on {out.values.device} and x on {x.device}; both must be on one device")
    if x.numel() == 0:
        return out
    groups = pieces(size, group)
    block = min(_VALUES // group, power_of_two(groups))
    codes = out.values.view(torch.uint8)  # bytes: all rounding is the kernel's own
    values, codes, scales = extents(target_of(x.device), x, codes, out.scales)
    quantize_kernel[(tokens, pieces(groups, block))](
        values,
        codes,
        scales,
        size,
        groups,
        size if x.is_contiguous() else x.stride(0),  # one row may have any stride, and Triton looks at it
        BLOCK_G=block,
        GROUP=group,
        FNUZ=dtype == torch.float8_e4m3fnuz,
        num_warps=4,
    )
    return out
