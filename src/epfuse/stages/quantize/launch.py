"""Launch the quantise kernel."""

from __future__ import annotations

import torch
import triton

from epfuse.errors import DeviceError, DtypeError, LayoutError, ShapeError
from epfuse.numerics.mxfp8 import BLOCK, MXFP8, SOURCE_DTYPES, VALUE_DTYPES, ScaleLayout, ScaleRounding
from epfuse.stages.quantize.kernel import quantize_kernel

_GROUPS = 32  # 1024 values a program: with 4 warps, a lane loads 16 bytes of BF16 (8 with 4 waves of 64)


def launch_quantize(
    x: torch.Tensor,
    rounding: ScaleRounding = ScaleRounding.FLOOR,
    dtype: torch.dtype = torch.float8_e4m3fn,
    out: MXFP8 | None = None,
) -> MXFP8:
    """Quantise activations per token and 32 values; bitwise what `epfuse.stages.quantize.reference` gives.

    Args:
        x: ``[T, K]`` bfloat16, float16 or float32; K a multiple of 32, values of a row adjacent, any row stride.
        rounding: rule of the shared exponent.
        dtype: float8_e4m3fn, or float8_e4m3fnuz: the same numbers, for gfx94x.
        out: ``[T, K]`` of ``dtype`` with scales in layout ROWS; every byte is written. Allocated if None.

    Returns:
        ``out``.

    Raises:
        ShapeError: x is not ``[T, K]`` with K a multiple of 32, or out has another shape.
        DtypeError: x or out has another dtype.
        DeviceError: out is on another device than x.
        LayoutError: values of a row of x are not adjacent, or out's scales are PACKED.

    Host syncs: none; graph-capturable; bitwise repeatable.
    """
    if x.dim() != 2 or x.shape[1] % BLOCK:
        raise ShapeError(f"x has shape {tuple(x.shape)}; it must be [T, K] with K a multiple of {BLOCK}")
    if x.dtype not in SOURCE_DTYPES:
        raise DtypeError(f"x has dtype {x.dtype}; MXFP8 encodes bfloat16, float16 or float32")
    if dtype not in VALUE_DTYPES:
        raise DtypeError(f"dtype is {dtype}; it must be float8_e4m3fn or float8_e4m3fnuz")
    tokens, size = x.shape
    if x.stride(1) != 1 and x.numel():
        raise LayoutError(f"x has strides {x.stride()}; the values of a row must be adjacent")
    if out is None:
        out = MXFP8(
            torch.empty(tokens, size, dtype=dtype, device=x.device),
            torch.empty(tokens, size // BLOCK, dtype=torch.uint8, device=x.device),
        )
    elif out.shape != x.shape:
        raise ShapeError(f"out has shape {tuple(out.shape)}; it must be x's {tuple(x.shape)}")
    elif out.values.dtype != dtype:
        raise DtypeError(f"out has dtype {out.values.dtype}; it must be {dtype}")
    elif out.device != x.device:
        raise DeviceError(f"out is on {out.device} and x on {x.device}; both must be on one device")
    elif out.layout is not ScaleLayout.ROWS:
        raise LayoutError(f"out has scales in layout {out.layout.name}; the kernel writes ROWS")
    if x.numel() == 0:
        return out
    groups = min(_GROUPS, triton.next_power_of_2(size // BLOCK))
    quantize_kernel[(tokens, triton.cdiv(size // BLOCK, groups))](
        x,
        # bytes: the interpreter has no pointers to E4M3FNUZ
        out.values.view(torch.uint8),
        out.scales,
        size,
        x.stride(0),
        BLOCK_G=groups,
        CEIL=rounding is ScaleRounding.CEIL,
        FNUZ=dtype == torch.float8_e4m3fnuz,
        num_warps=4,
    )
    return out
