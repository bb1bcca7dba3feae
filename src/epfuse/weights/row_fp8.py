"""FP8 weights with one scale a row, in the order in which Hopper's FP8 tensor cores take them from shared memory.

MXFP8's scales are powers of two, so a code can take another one: the exponent moves, the mantissa stays. All of a row
are brought to the smallest scale that holds its largest value, and then a product of FP8 rows needs no scale before it
is complete. Exact for every value that is at least 2^-13 of its row's largest; below that E4M3 becomes subnormal, and
rounds to a multiple of at most 2^-16 of it. (Weights of a normal distribution lose 1e-7 of their norm, wilder ones
up to 2e-6: docs/notebook/performance.md, 44.)

A panel is 64 weight rows. Its codes lie as ``[K / 128][64 rows][128]``, so that what one step multiplies is adjacent.

How long the longest rows are is kept beside them: by that a bound of a call's results is known before they are
(`epfuse.stages.quantize.launch_packed.Bounds`).

A row that holds NaN has the scale NaN too. Whatever is multiplied with it is NaN anyway, and kernels that make BF16 of
the codes need not look for the one that is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from epfuse.arguments import checks_enums
from epfuse.config import WeightFormat
from epfuse.numerics.e8m0 import NAN_BYTE, ScaleRounding, decode_scales, magnitude_bits, scale_bytes
from epfuse.numerics.mxfp8 import BLOCK, MXFP8
from epfuse.target import Target
from epfuse.weights.panels import (
    PANEL_ROWS,
    STEP_K,
    PanelProjections,
    PanelStack,
    RowOrder,
    is_aligned,
    require_fn,
    source_rows,
    take_rows,
)
from epfuse.weights.projections import Forms, Part

_BIAS = 127
_LEAST, _MOST = 1, 254
"""Bytes of the row scales: float32 holds them as normal numbers."""


@checks_enums
@dataclass(frozen=True)
class RowFP8(PanelStack):
    """A stack of FP8 matrices with a scale for each row.

    Attributes:
        codes: ``[L, panels, K_padded / 128, 64, 128]`` float8_e4m3fn.
        scales: ``[L, panels * 64]`` float32, powers of two; NaN for a row that holds NaN.
        longest: ``[L, 2]`` float32: Euclidean length of the longest packed row of every other group of 8, the first
            group's and the second's: in order GATE_UP of gate rows and of up rows. NaN where one holds NaN.
    """

    longest: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Codes, scales, then lengths."""
        return self.codes, self.scales, self.longest

    @property
    def steps(self) -> int:
        """Steps of 128 k."""
        return self.codes.shape[2]

    def matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One expert's ``[N, K]`` in the checkpoint's order; float32 and float64 hold every value."""
        source = source_rows(self.rows, self.order).to(self.device)
        real = source >= 0
        packed = self.codes[expert].transpose(1, 2).reshape(source.numel(), self.steps * STEP_K).to(dtype)
        out = torch.empty(self.rows, self.columns, dtype=dtype, device=self.device)
        out[source[real]] = (packed * self.scales[expert].to(dtype)[:, None])[real, : self.columns]
        return out


@dataclass(frozen=True)
class RowFP8Experts(PanelProjections[RowFP8]):
    """FP8 as `epfuse.weights.mxfp8` prepares it for Hopper's W8A8."""

    stack: ClassVar[type[RowFP8]] = RowFP8
    forms: ClassVar[Forms] = {WeightFormat.ROW_FP8: Target.SM90}

    @classmethod
    @checks_enums
    def parts(cls, form: WeightFormat, size: tuple[int, int, int], dtype: torch.dtype) -> tuple[Part, ...]:
        """Codes, 128 k of a panel adjacent, a float32 for each row, and two for each expert."""
        local, panels, steps = size[0], -(-size[1] // PANEL_ROWS), -(-size[2] // STEP_K)
        codes = (local, panels, steps, PANEL_ROWS, STEP_K)
        scales, longest = (local, panels * PANEL_ROWS), (local, 2)
        return (codes, torch.float8_e4m3fn), (scales, torch.float32), (longest, torch.float32)


@torch.no_grad()
@checks_enums
def pack_rows(weights: MXFP8, order: RowOrder) -> RowFP8:
    """Repack, one matrix at a time, into the codes' memory where the sizes allow it.

    Args:
        weights: ``[L, N, K]`` E4M3FN. **Codes are overwritten** when N is a multiple of 64 and K of 128, and they begin
            at a multiple of 16 bytes (and consumed: `Consumable`); otherwise left alone and new memory is taken.
        order: GATE_UP for w13 ``[L, 2I, H]``, PLAIN for w2.

    Raises:
        DtypeError: the codes are not E4M3FN.
    """
    require_fn(weights)
    values, bytes_ = weights.values, weights.scales
    local, rows, columns = values.shape
    steps = -(-columns // STEP_K)
    source = source_rows(rows, order).to(values.device)
    size = (local, source.numel() // PANEL_ROWS, steps, PANEL_ROWS, STEP_K)
    fits = source.numel() == rows and steps * STEP_K == columns and is_aligned(values)
    codes = values.view(size) if fits else values.new_empty(size)
    scales = torch.empty(local, source.numel(), dtype=torch.float32, device=values.device)
    longest = torch.empty(local, 2, dtype=torch.float32, device=values.device)
    if fits:
        weights.consume("codes with one scale a row", "values")
    for expert in range(local):
        moved, row_scales = one_scale_a_row(values[expert], bytes_[expert])
        bits = moved.view(torch.uint8)
        row_scales.masked_fill_(((bits & 0x7F) == 0x7F).any(1), float("nan"))
        packed = take_rows(bits, source, steps * STEP_K, 0)
        codes[expert] = packed.view(moved.dtype).view(-1, PANEL_ROWS, steps, STEP_K).transpose(1, 2)
        scales[expert] = torch.where(source >= 0, row_scales[source.clamp(min=0)], 1.0)
        longest[expert] = longest_rows(packed.view(moved.dtype), scales[expert])
    return RowFP8(codes, scales, rows, columns, order, longest)


def longest_rows(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Euclidean length of the longest row of the first, third, .. group of 8 rows, and of the second, fourth, ..

    Args:
        codes: ``[panels * 64, K]`` float8_e4m3fn.
        scales: ``[panels * 64]`` float32.

    Returns:
        ``[2]`` float32; NaN where a row of the groups holds NaN.
    """
    lengths = codes.float().square().sum(1).sqrt() * scales
    return lengths.view(-1, 2, 8).amax((0, 2))


def one_scale_a_row(values: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MXFP8 ``[N, K]`` -> the same numbers as E4M3FN codes ``[N, K]`` and float32 powers of two ``[N]``.

    NaN stays NaN, and does not touch the rest of its row.

    Args:
        values: ``[N, K]`` float8_e4m3fn.
        scales: ``[N, K / 32]`` E8M0 bytes.
    """
    rows, columns = values.shape
    numbers = values.float().view(rows, columns // BLOCK, BLOCK)
    exponents = scales.int()
    largest = numbers.abs().nan_to_num(nan=0.0).amax(-1)
    # the least power of two that holds a group
    needed = exponents + scale_bytes(magnitude_bits(largest), ScaleRounding.CEIL) - _BIAS
    needed = needed.masked_fill((largest == 0) | (exponents == NAN_BYTE), _LEAST)
    of_row = needed.amax(1, keepdim=True).clamp(_LEAST, _MOST)
    # 0 for a group far below its row's largest, of which nothing is left; where it would be large all values are 0
    factors = torch.exp2((exponents - of_row).clamp(max=32).float())
    factors = factors.masked_fill(exponents == NAN_BYTE, float("nan"))
    moved = (numbers * factors[..., None]).view(rows, columns).to(torch.float8_e4m3fn)
    return moved, decode_scales(of_row.squeeze(1).to(torch.uint8), torch.float32)
