"""MXFP8: E4M3 values with one E8M0 scale byte per 32 of them along the last dimension.

Source: OCP Microscaling Formats (MX) v1.0. What that leaves to the implementation is fixed here:

* A block that holds an infinity or a NaN is NaN as a whole: scale byte 255 and every code NaN, so that also a reader
  that takes the byte for a plain exponent gets no finite number out of it.
* A block of zeros has scale byte 0, the limit of the rule for amax -> 0; it decodes to exact zeros.
* Zeros keep their sign in E4M3FN; E4M3FNUZ has no -0.
* A product beyond the largest float32 decodes to an infinity.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from epfuse.arguments import checks_enums
from epfuse.errors import DtypeError, ShapeError
from epfuse.numerics.consumable import Consumable
from epfuse.numerics.e8m0 import (
    NAN_BYTE,
    ScaleRounding,
    as_e8m0_bytes,
    decode_scales,
    inverse_scales,
    magnitude_bits,
    scale_bytes,
)
from epfuse.numerics.fnuz import FN_NAN, double_scales, normalize_to_fnuz_, require_e4m3fn
from epfuse.operands import require_plain

__all__ = [
    "BLOCK",
    "DECODED_DTYPES",
    "E4M3_MAX",
    "MXFP8",
    "SOURCE_DTYPES",
    "VALUE_DTYPES",
    "ScaleRounding",
    "decode",
    "encode",
]

BLOCK = 32
"""Values that share a scale."""
E4M3_MAX = 448.0
"""Largest finite E4M3FN value."""
SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VALUE_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
DECODED_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
@checks_enums
def encode(x: torch.Tensor, rounding: ScaleRounding = ScaleRounding.FLOOR) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to MXFP8: round to nearest even, saturating at +-448.

    Args:
        x: ``[.., K]`` bfloat16, float16 or float32, K a multiple of 32.
        rounding: rule of the shared exponent.

    Returns:
        ``[.., K]`` float8_e4m3fn, contiguous, and ``[.., K/32]`` uint8. Bytes are 0..247, or 255 for a block that
        holds an infinity or a NaN.

    Raises:
        DtypeError: another dtype (float64 would be rounded twice).
        ShapeError: K is not a multiple of 32.
    """
    require_plain("x", x)
    if x.dtype not in SOURCE_DTYPES:
        raise DtypeError(f"x has dtype {x.dtype}; MXFP8 encodes bfloat16, float16 or float32")
    blocks = x.contiguous().to(torch.float32).reshape(_blocked("x", x))
    scales = scale_bytes(magnitude_bits(blocks).amax(-1), rounding)
    # an exact product: a power of two, and what underflows here is far below half of E4M3's smallest value
    scaled = blocks * inverse_scales(scales).unsqueeze(-1)
    codes = scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    codes.masked_fill_((scales == NAN_BYTE).unsqueeze(-1), FN_NAN)
    return codes.view(torch.float8_e4m3fn).reshape(x.shape), scales.to(torch.uint8)


@torch.no_grad()
def decode(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The numbers that MXFP8 stands for.

    float64 is exact for every code and byte. float32 is exact except for products beyond its range, which are
    infinities. bfloat16 is float32 rounded once to nearest even, and exact wherever float32 is and the scale byte
    is at least 3 (E4M3FN) or 4 (E4M3FNUZ); below that the small codes fall between bfloat16 subnormals.

    Args:
        values: ``[.., K]`` float8_e4m3fn or float8_e4m3fnuz.
        scales: ``[.., K/32]`` uint8 or float8_e8m0fnu.
        dtype: bfloat16, float32 or float64.

    Returns:
        ``[.., K]`` of ``dtype``; NaN where the code or the scale is NaN.

    Raises:
        DtypeError: a dtype is none of these.
        ShapeError: K is not a multiple of 32 or scales does not have one byte per block.
    """
    _check_values(values)
    if dtype not in DECODED_DTYPES:
        raise DtypeError(f"dtype is {dtype}; MXFP8 decodes to bfloat16, float32 or float64")
    blocked, scales = _blocked("values", values), as_e8m0_bytes("scales", scales)
    if scales.shape != blocked[:-1]:
        raise ShapeError(
            f"scales has shape {tuple(scales.shape)}; beside values {tuple(values.shape)} it must be {blocked[:-1]}"
        )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    product = values.to(wide).reshape(blocked).mul_(decode_scales(scales, wide).unsqueeze(-1))
    return product.reshape(values.shape).to(dtype)


@dataclass(frozen=True, repr=False)
class MXFP8(Consumable):
    """A matrix, or a stack of matrices, in MXFP8: values and scales travel together.

    The tensors are kept, not copied. Work on a stack goes one matrix ("expert") at a time, so that temporaries stay
    within a few times one matrix whatever the stack holds.

    Args:
        values: ``[.., N, K]`` contiguous, float8_e4m3fn, or float8_e4m3fnuz after `to_fnuz_`; K a multiple of 32.
        scales: ``[.., N, K/32]`` contiguous, uint8 or float8_e8m0fnu (kept as uint8).

    Raises:
        ShapeError: fewer than two dimensions, K not a multiple of 32, or scales of another shape.
        DtypeError: another dtype; raw uint8 values too, since their bytes don't tell E4M3FN from E4M3FNUZ.
        DeviceError: values and scales are on different devices.
        LayoutError: not contiguous.
    """

    def __post_init__(self) -> None:
        _check_values(self.values)
        object.__setattr__(self, "scales", as_e8m0_bytes("scales", self.scales))
        if self.values.dim() < 2:
            raise ShapeError(f"values has shape {tuple(self.values.shape)}; MXFP8 needs at least [N, K]")
        needed = _blocked("values", self.values)[:-1]
        if self.scales.shape != needed:
            raise ShapeError(
                f"scales has shape {tuple(self.scales.shape)}; beside values {tuple(self.values.shape)} it must be"
                f" {needed}"
            )
        self.require_together()

    @classmethod
    @checks_enums
    def quantize(cls, x: torch.Tensor, rounding: ScaleRounding = ScaleRounding.FLOOR) -> MXFP8:
        """Encode ``[.., N, K]`` bfloat16, float16 or float32.

        Raises:
            ShapeError, DtypeError: as `encode`; also fewer than two dimensions.
        """
        require_plain("x", x)
        if x.dim() < 2:
            raise ShapeError(f"x has shape {tuple(x.shape)}; MXFP8 needs at least [N, K]")
        blocked = _blocked("x", x)
        values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty(blocked[:-1], dtype=torch.uint8, device=x.device)
        quantized = cls(values, scales)
        for index in quantized._matrices():
            part_values, part_scales = encode(x[index], rounding)
            values[index].copy_(part_values)
            scales[index].copy_(part_scales)
        return quantized

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """``[.., N, K]`` numbers; `decode` says where they are exact.

        Args:
            dtype: bfloat16, float32 or float64.

        Raises:
            DtypeError: another dtype.
        """
        if dtype not in DECODED_DTYPES:
            raise DtypeError(f"dtype is {dtype}; MXFP8 decodes to bfloat16, float32 or float64")
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        for index in self._matrices():
            out[index].copy_(decode(self.values[index], self.scales[index], dtype))
        return out

    def matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """``[N, K]`` numbers of one expert, as `dequantize` gives them."""
        return self[expert].dequantize(dtype)

    def check_fnuz(self) -> None:
        """As `Consumable.check_fnuz`: no scale byte may be 254."""
        require_e4m3fn(self.values)
        double_scales(self.scales)

    def to_fnuz_(self) -> MXFP8:
        """As `Consumable.to_fnuz_`, one slice of the first dimension at a time."""
        self.check_fnuz()
        values, scales = self.values, self.scales
        self.consume("E4M3FNUZ", "values", "scales")
        return MXFP8(*normalize_to_fnuz_(values, scales))

    def __getitem__(self, index: int) -> MXFP8:
        """Matrix ``index`` of a stack ``[L, .., N, K]``: a view.

        Raises:
            ShapeError: not a stack.
            IndexError: no such matrix.
        """
        if self.values.dim() < 3:
            raise ShapeError(f"values has shape {tuple(self.shape)}; only a stack [L, .., N, K] can be indexed")
        return MXFP8(self.values[index], self.scales[index])

    def _matrices(self) -> list[tuple[int, ...]]:
        """Index of each ``[N, K]`` matrix."""
        return list(itertools.product(*map(range, self.shape[:-2])))


def _check_values(values: torch.Tensor) -> None:
    require_plain("values", values)
    if values.dtype not in VALUE_DTYPES:
        raise DtypeError(f"values has dtype {values.dtype}; MXFP8 values are float8_e4m3fn or float8_e4m3fnuz")


def _blocked(name: str, tensor: torch.Tensor) -> tuple[int, ...]:
    """[.., K] -> (.., K/32, 32)."""
    size = tensor.shape[-1] if tensor.dim() else 0
    if tensor.dim() == 0 or size % BLOCK:
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; its last size must be a multiple of {BLOCK}")
    return (*tensor.shape[:-1], size // BLOCK, BLOCK)
