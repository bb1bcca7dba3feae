"""MXFP8 weights in the order in which a Hopper warpgroup multiplies with them.

A panel is 64 weight rows. Within a panel, 32 k at a time, the 2,048 codes lie as ``[128 threads][16 bytes]``: thread
``32 * w + 4 * g + t`` holds rows ``16 * w + g`` and ``+ 8``, k ``2 * t + {0, 1}`` + ``{0, 8, 16, 24}``, which is the
register operand of wgmma (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"). So a thread's 16-byte load is
what it multiplies with, and a panel is one contiguous piece of memory. Within a 4-byte word the two rows alternate,
the second first, and the two codes of each half word are woven into one another. The code of the first row lies where a
BF16's sign and lowest exponent bits are, the other code in the bits between. So one mask turns two codes of the first
row into BF16, and two shifts and two masks turn two codes of the second.

The scale bytes of a row lie four to an int32, for 128 k; a panel's 64 rows are adjacent. A stored byte is the E8M0
byte plus 120: as a BF16 exponent it is the scale times 2^120, which makes up for the shifted codes' 2^-120.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from epfuse.arguments import checks_enums
from epfuse.config import WeightFormat
from epfuse.errors import ConfigError
from epfuse.numerics.mxfp8 import MXFP8
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

SCALE_SHIFT = 120
LARGEST_SCALE = 254 - SCALE_SHIFT
"""Largest E8M0 byte that has a place: 2^7. Real weights lie far below: a block would hold a value over 2^15."""

GROUP_BYTES = 64 << 20
"""Codes that are rearranged at a time: several small experts, so that the host keeps up with the device. It takes some
five times that besides."""


@checks_enums
@dataclass(frozen=True)
class FragmentMXFP8(PanelStack):
    """A stack of MXFP8 matrices in fragment order.

    Attributes:
        codes: ``[L, panels, K_padded / 32, 2048]`` uint8.
        scales: ``[L, panels, K_padded / 128, 64]`` int32.
    """

    @property
    def padded_columns(self) -> int:
        return self.codes.shape[2] * 32

    def matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One expert's ``[N, K]`` in the checkpoint's order."""
        return unpack(self, expert).dequantize(dtype)


@dataclass(frozen=True)
class FragmentExperts(PanelProjections[FragmentMXFP8]):
    """MXFP8 as `epfuse.weights.mxfp8` prepares it for Hopper's W8A16."""

    stack: ClassVar[type[FragmentMXFP8]] = FragmentMXFP8
    forms: ClassVar[Forms] = {WeightFormat.FRAGMENT: Target.SM90}

    @classmethod
    @checks_enums
    def parts(cls, form: WeightFormat, size: tuple[int, int, int], dtype: torch.dtype) -> tuple[Part, ...]:
        """Codes, 32 k of a panel adjacent, and four scale bytes to an int32."""
        local, panels, steps = size[0], -(-size[1] // PANEL_ROWS), -(-size[2] // STEP_K)
        codes = (local, panels, steps * STEP_K // 32, 32 * PANEL_ROWS)
        return (codes, torch.uint8), ((local, panels, steps, PANEL_ROWS), torch.int32)


@torch.no_grad()
@checks_enums
def pack(weights: MXFP8, order: RowOrder) -> FragmentMXFP8:
    """Repack, a few matrices at a time, into the memory of ``weights`` where the sizes allow it.

    Args:
        weights: ``[L, N, K]`` E4M3FN. **Overwritten** when N is a multiple of 64 and K of 128, and both tensors begin
            at multiples of 16 bytes (and consumed: `Consumable`); otherwise left alone and new memory is taken.
        order: GATE_UP for w13 ``[L, 2I, H]``, PLAIN for w2.

    Raises:
        ConfigError: as `check_packable`; such weights run in their own order.
        DtypeError: the codes are not E4M3FN.
    """
    local, rows, columns = weights.values.shape
    padded = -(-columns // STEP_K) * STEP_K
    source = source_rows(rows, order)
    panels = source.numel() // PANEL_ROWS
    check_packable(weights)
    codes, scales = weights.values.view(torch.uint8), weights.scales
    if panels * PANEL_ROWS == rows and padded == columns and is_aligned(codes) and is_aligned(scales):
        weights.consume("fragment order", "values", "scales")
        out_codes = codes.view(local, panels, padded // 32, 2048)
        out_scales = scales.view(local, panels, padded // STEP_K, 256)
    else:
        out_codes = codes.new_empty(local, panels, padded // 32, 2048)
        out_scales = scales.new_empty(local, panels, padded // STEP_K, 256)
    source = source.to(codes.device)
    for some in groups(local, rows * padded):
        packed = pack_codes(take_rows(codes[some], source, padded, 0).flatten(0, 1))
        out_codes[some] = packed.view_as(out_codes[some])
        shifted = take_rows(scales[some] + SCALE_SHIFT, source, padded // 32, SCALE_SHIFT)
        out_scales[some] = pack_scales(shifted.flatten(0, 1)).view_as(out_scales[some])
    return FragmentMXFP8(out_codes, out_scales.view(torch.int32), rows, columns, order)


def groups(local: int, size: int) -> Iterator[slice]:
    """All experts, as many at a time as have `GROUP_BYTES`, or one.

    Args:
        local: L.
        size: bytes of one expert's matrix.
    """
    count = max(1, GROUP_BYTES // max(1, size))
    for first in range(0, local, count):
        yield slice(first, first + count)


def check_packable(weights: MXFP8) -> None:
    """Refuse what fragment order has no code for.

    Raises:
        DtypeError: the codes are not E4M3FN.
        ConfigError: a scale byte is over 134, or a code is NaN; names the first expert that holds one.

    Host syncs: one, after all experts.
    """
    require_fn(weights)
    codes = weights.values.view(torch.uint8)
    nan = torch.empty(codes.shape[0], dtype=torch.int32, device=codes.device)
    for some in groups(len(codes), codes[:1].numel()):  # what is computed in between is as large as the codes
        nan[some] = ((codes[some] & 0x7F) == 0x7F).flatten(1).any(1).int()
    found = torch.stack([weights.scales.amax(dim=(1, 2)).int(), nan])
    for expert, (largest, has_nan) in enumerate(zip(*found.tolist(), strict=True)):
        if largest > LARGEST_SCALE:
            raise ConfigError(f"expert {expert} has scale byte {largest}; fragment order holds up to {LARGEST_SCALE}")
        if has_nan:
            raise ConfigError(f"expert {expert} holds NaN codes; fragment order has none")


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """A matrix's codes in fragment order.

    Args:
        codes: ``[N, K]`` uint8, N whole panels of 64 rows, K a multiple of 32.

    Returns:
        ``[N / 64, K / 32, 2048]`` uint8, new memory.
    """
    # rows: panel, warp 4, half 2, g 8; columns: step, 2 (k 16), 2 (k 8), t 4, 2 (k 1)
    parts = codes.view(-1, 4, 2, 8, codes.shape[1] // 32, 2, 2, 4, 2).flip(2)
    return weave(parts.permute(0, 4, 1, 3, 7, 5, 6, 8, 2).reshape(-1, codes.shape[1] // 32, 2048))


def weave(codes: torch.Tensor) -> torch.Tensor:
    """Byte pairs (second, first) -> half words that hold both codes, as the kernels' masks take them apart.

    uint8 to uint8 of the same shape, the last dimension even; new memory.

    The first code's sign is bit 15 and the rest of it bits 10 to 4; the second one's sign is bit 11, its upper bits are
    14 to 12 and its lower ones 3 to 0.
    """
    second, first = codes[..., 0::2], codes[..., 1::2]
    low = ((first & 0x0F) << 4) | (second & 0x0F)
    high = (first & 0x80) | (second & 0x70) | ((second & 0x80) >> 4) | ((first & 0x70) >> 4)
    return torch.stack([low, high], dim=-1).flatten(-2)


def unweave(woven: torch.Tensor) -> torch.Tensor:
    """The inverse of `weave`: uint8 to uint8 of the same shape, new memory."""
    low, high = woven[..., 0::2], woven[..., 1::2]
    first = (high & 0x80) | ((high & 0x07) << 4) | (low >> 4)
    second = ((high & 0x08) << 4) | (high & 0x70) | (low & 0x0F)
    return torch.stack([second, first], dim=-1).flatten(-2)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_codes`: ``[panels, K / 32, 2048]`` uint8 -> ``[panels * 64, K]`` uint8, new memory."""
    panels, steps, _ = packed.shape
    parts = unweave(packed).view(panels, steps, 4, 8, 4, 2, 2, 2, 2).permute(0, 2, 8, 3, 1, 5, 6, 4, 7).flip(2)
    return parts.reshape(panels * PANEL_ROWS, steps * 32)


def pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """A matrix's scale bytes in fragment order, four of a row adjacent.

    Args:
        scales: ``[N, K / 32]`` uint8, N whole panels of 64 rows, K a multiple of 128; shifted by SCALE_SHIFT already.

    Returns:
        ``[N / 64, K / 128, 256]`` uint8, new memory.
    """
    return scales.view(-1, PANEL_ROWS, scales.shape[1] // 4, 4).transpose(1, 2).reshape(-1, scales.shape[1] // 4, 256)


def unpack_scales(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_scales`: ``[panels, K / 128, 256]`` uint8 -> ``[panels * 64, K / 32]`` uint8."""
    panels, steps, _ = packed.shape
    return packed.view(panels, steps, PANEL_ROWS, 4).transpose(1, 2).reshape(panels * PANEL_ROWS, steps * 4)


def unpack(weights: FragmentMXFP8, expert: int) -> MXFP8:
    """The inverse of `pack` for one matrix.

    Args:
        weights: a stack of L matrices.
        expert: which of them, 0 to L - 1.

    Returns:
        ``[N, K]`` float8_e4m3fn with scales ``[N, K / 32]`` uint8, in new memory.
    """
    source = source_rows(weights.rows, weights.order).to(weights.codes.device)
    real = source >= 0
    codes = weights.codes.new_empty(weights.rows, weights.columns)
    scales = weights.codes.new_empty(weights.rows, weights.columns // 32)
    codes[source[real]] = unpack_codes(weights.codes[expert])[real, : weights.columns]
    shifted = unpack_scales(weights.scales[expert].view(torch.uint8))[real, : weights.columns // 32]
    scales[source[real]] = shifted - SCALE_SHIFT
    return MXFP8(codes.view(torch.float8_e4m3fn), scales)
