"""Block FP8: E4M3 values with one FP32 scale per 128x128 block of an expert's matrix, converted at load.

The format of DeepSeek-V3's checkpoints, for which FP8 grouped GEMMs exist on GPUs without MX matrix cores.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from epfuse.arguments import checks_enums
from epfuse.config import WeightFormat
from epfuse.errors import ConfigError, DtypeError, ShapeError
from epfuse.numerics.consumable import Consumable
from epfuse.numerics.e8m0 import ScaleRounding, decode_scales, magnitude_bits, scale_bytes
from epfuse.numerics.fnuz import fn_codes_to_fnuz
from epfuse.numerics.mxfp8 import BLOCK as MX_BLOCK
from epfuse.numerics.mxfp8 import DECODED_DTYPES, E4M3_MAX, MXFP8, SOURCE_DTYPES, VALUE_DTYPES
from epfuse.operands import require_plain
from epfuse.target import Target
from epfuse.weights.projections import E4M3Projections, Forms, Part

BLOCK = 128
"""Rows and columns that share a scale."""


class BlockScale(enum.Enum):
    """Which scale a block gets; both are at least the smallest normal float32, also for a block of zeros."""

    POWER_OF_TWO = "power_of_two"
    """The smallest power of two under which no value saturates. From MXFP8 only exponents change, so a value is kept
    exactly unless it falls among E4M3's subnormals."""
    AMAX = "amax"
    """``amax / 448``, as DeepSeek-V3: uses the whole range of E4M3, and rounds every value of an MXFP8 source again."""


@dataclass(frozen=True, repr=False)
class BlockFP8(Consumable):
    """The weights of L experts in block FP8: number = value * scale of its block.

    Args:
        values: ``[L, N, K]`` contiguous, float8_e4m3fn, or float8_e4m3fnuz after `to_fnuz_`.
        scales: ``[L, ceil(N/128), ceil(K/128)]`` contiguous float32.

    Raises:
        ShapeError, DtypeError, DeviceError, LayoutError: the two don't fit together.
    """

    def __post_init__(self) -> None:
        require_plain("values", self.values)
        require_plain("scales", self.scales)
        if self.values.dim() != 3:
            raise ShapeError(f"values has shape {tuple(self.values.shape)}; block FP8 weights are [L, N, K]")
        if self.values.dtype not in VALUE_DTYPES:
            raise DtypeError(
                f"values has dtype {self.values.dtype}; block FP8 values are float8_e4m3fn or float8_e4m3fnuz"
            )
        if self.scales.dtype != torch.float32:
            raise DtypeError(f"scales has dtype {self.scales.dtype}; block FP8 scales are float32")
        needed = _scale_shape(self.values.shape)
        if self.scales.shape != needed:
            raise ShapeError(
                f"scales has shape {tuple(self.scales.shape)}; beside values {tuple(self.values.shape)} it must be"
                f" {needed}"
            )
        self.require_together()

    @classmethod
    @torch.no_grad()
    @checks_enums
    def quantize(cls, weight: MXFP8 | torch.Tensor, scale: BlockScale = BlockScale.POWER_OF_TWO) -> BlockFP8:
        """Convert, one expert at a time: temporaries stay within a few float32 copies of one expert's matrix.

        Values are rounded to nearest even. A block that holds an infinity or a NaN is NaN as a whole: scale NaN and
        every code NaN.

        Args:
            weight: ``[L, N, K]``, MXFP8, or bfloat16, float16 or float32.
            scale: rule of the scales.

        Raises:
            ShapeError: not three-dimensional.
            DtypeError: a dense weight of another dtype.
        """
        if not isinstance(weight, MXFP8):
            require_plain("weight", weight)
        if len(weight.shape) != 3:
            raise ShapeError(f"weight has shape {tuple(weight.shape)}; block FP8 weights are [L, N, K]")
        if isinstance(weight, torch.Tensor) and weight.dtype not in SOURCE_DTYPES:
            raise DtypeError(f"weight has dtype {weight.dtype}; it must be MXFP8, bfloat16, float16 or float32")
        values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
        scales = torch.empty(_scale_shape(weight.shape), dtype=torch.float32, device=weight.device)
        for expert in range(weight.shape[0]):
            matrix = weight[expert]
            dense = matrix.dequantize(torch.float32) if isinstance(matrix, MXFP8) else matrix.to(torch.float32)
            _quantize_matrix(dense, scale, values[expert], scales[expert])
        return cls(values, scales)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """``[L, N, K]`` numbers: the product in float32 (exact in float64), rounded once to ``dtype``.

        Raises:
            DtypeError: ``dtype`` is not bfloat16, float32 or float64.
        """
        if dtype not in DECODED_DTYPES:
            raise DtypeError(f"dtype is {dtype}; block FP8 decodes to bfloat16, float32 or float64")
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        out = torch.empty(self.values.shape, dtype=dtype, device=self.values.device)
        for values, scales, matrix in zip(self.values, self.scales, out, strict=True):
            rows = scales.to(wide).repeat_interleave(BLOCK, 0)[: values.shape[0]]
            matrix.copy_(values.to(wide).mul_(rows.repeat_interleave(BLOCK, 1)[:, : values.shape[1]]))
        return out

    def matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """``[N, K]`` numbers of one expert, as `dequantize` gives them."""
        return BlockFP8(self.values[expert : expert + 1], self.scales[expert : expert + 1]).dequantize(dtype)[0]

    def check_fnuz(self) -> None:
        """As `Consumable.check_fnuz`: no finite scale may have a double that is not."""
        if self.values.dtype != torch.float8_e4m3fn:
            raise DtypeError(f"values has dtype {self.values.dtype}; E4M3FNUZ is made from float8_e4m3fn")
        if bool((self.scales.isfinite() & (self.scales * 2).isinf()).any()):
            raise ConfigError("scales holds a number whose double float32 can't hold; E4M3FNUZ needs each one doubled")

    @torch.no_grad()
    def to_fnuz_(self) -> BlockFP8:
        """As `Consumable.to_fnuz_`, one expert at a time: codes keep their bits, scales double."""
        self.check_fnuz()
        codes, scales = self.values.view(torch.uint8), self.scales
        self.consume("E4M3FNUZ", "values", "scales")
        for matrix in codes:
            matrix.copy_(fn_codes_to_fnuz(matrix))
        return BlockFP8(codes.view(torch.float8_e4m3fnuz), scales.mul_(2))


@dataclass(frozen=True)
class BlockFP8Experts(E4M3Projections[BlockFP8]):
    """Block FP8; `epfuse.ExpertWeights.block_fp8` makes it from MXFP8."""

    stack: ClassVar[type[BlockFP8]] = BlockFP8
    forms: ClassVar[Forms] = {
        WeightFormat.BLOCK_FP8: None,
        WeightFormat.BLOCK_FP8_FNUZ: Target.GFX942,
    }

    @classmethod
    @checks_enums
    def parts(cls, form: WeightFormat, size: tuple[int, int, int], dtype: torch.dtype) -> tuple[Part, ...]:
        """Values, and a float32 for 128x128 of them."""
        return (size, cls.codes(form)), (_scale_shape(size), torch.float32)

    @classmethod
    def of_mxfp8(cls, w13: MXFP8, w2: MXFP8) -> Self:
        """As `epfuse.ExpertWeights.block_fp8` converts them."""
        return cls(BlockFP8.quantize(w13), BlockFP8.quantize(w2))


def scale_block(weights: MXFP8 | BlockFP8) -> tuple[int, int]:
    """(rows, columns) of a matrix that share a scale."""
    return (BLOCK, BLOCK) if isinstance(weights, BlockFP8) else (1, MX_BLOCK)


def _scale_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    experts, rows, columns = shape
    return experts, -(-rows // BLOCK), -(-columns // BLOCK)


def _quantize_matrix(dense: torch.Tensor, rule: BlockScale, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Fill ``values`` [N, K] and ``scales`` from float32 ``dense`` [N, K]."""
    rows, columns = dense.shape
    padded = torch.nn.functional.pad(dense, (0, -columns % BLOCK, 0, -rows % BLOCK)).contiguous()
    blocks = padded.view(scales.shape[0], BLOCK, scales.shape[1], BLOCK)
    amax = magnitude_bits(blocks).amax((1, 3))
    power = decode_scales(scale_bytes(amax, ScaleRounding.CEIL).to(torch.uint8), torch.float32)
    if rule is BlockScale.POWER_OF_TWO:
        scale = power
    else:
        scale = (amax.view(torch.float32) / E4M3_MAX).masked_fill_(power.isnan(), float("nan"))
    # a subnormal quotient would be off by more than E4M3's own rounding, and a quotient of zero divides by zero
    scales.copy_(scale.clamp_(min=torch.finfo(torch.float32).tiny))
    # clamped because amax over its own rounded quotient may come out just above 448; a NaN scale makes every code NaN
    codes = (blocks / scales[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    values.copy_(codes.view(padded.shape)[:rows, :columns])
