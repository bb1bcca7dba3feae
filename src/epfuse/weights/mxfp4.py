"""MXFP4, two E2M1 numbers in a byte: what gpt-oss checkpoints have for experts. It becomes MXFP8 at load, exactly.

Every E2M1 number is an E4M3 number, and both formats share an E8M0 byte among 32 of them: codes are translated, scales
stay as they are. The codes then take twice the bytes, 1.03 a weight in place of 0.53.

Source: OCP Microscaling Formats (MX) v1.0; for the order in a byte transformers' ``integrations/mxfp4.py``.
"""

from __future__ import annotations

import torch

from epfuse.errors import DeviceError, DtypeError, ShapeError
from epfuse.numerics.e8m0 import as_e8m0_bytes
from epfuse.numerics.mxfp8 import BLOCK, MXFP8
from epfuse.operands import require_plain

PACKED = BLOCK // 2
"""Bytes that share a scale."""
AT_ONCE = 1 << 20
"""Bytes that are translated at once: each takes four more while it is an index."""
_E4M3_OF = (0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C)
"""E4M3 codes of E2M1's 0, 0.5, 1, 1.5, 2, 3, 4 and 6; the sign is the highest bit of both."""


@torch.no_grad()
def to_mxfp8(blocks: torch.Tensor, scales: torch.Tensor) -> MXFP8:
    """The same numbers as MXFP8, in new memory and little beside it.

    Rows stay in their order: gate and up rows of gpt-oss' ``gate_up_proj_blocks`` still alternate.

    Args:
        blocks: ``[.., N, K / 32, 16]`` uint8, as gpt-oss' ``*_blocks``: of two numbers in a byte the first is the lower
            half.
        scales: ``[.., N, K / 32]`` E8M0 bytes, uint8 or float8_e8m0fnu, as gpt-oss' ``*_scales``.

    Returns:
        ``[.., N, K]``; its scales are a copy.

    Raises:
        ConfigError, ShapeError, DtypeError, DeviceError, LayoutError: the two are no MXFP4 weights.
    """
    require_plain("blocks", blocks)
    scales = as_e8m0_bytes("scales", scales)
    if blocks.dtype != torch.uint8:
        raise DtypeError(f"blocks has dtype {blocks.dtype}; MXFP4 lies in uint8, two numbers in a byte")
    if blocks.dim() < 3 or blocks.shape[-1] != PACKED:
        raise ShapeError(f"blocks has shape {tuple(blocks.shape)}; it must be [.., N, K/{BLOCK}, {PACKED}]")
    if scales.shape != blocks.shape[:-1]:
        raise ShapeError(
            f"scales has shape {tuple(scales.shape)}; beside blocks {tuple(blocks.shape)} it must be"
            f" {tuple(blocks.shape[:-1])}"
        )
    if scales.device != blocks.device:
        raise DeviceError(f"blocks is on {blocks.device} and scales on {scales.device}; both must be on one device")
    *stack, rows, groups, _ = blocks.shape
    codes = torch.empty((*stack, rows, groups * BLOCK), dtype=torch.uint8, device=blocks.device)
    if codes.numel() and not blocks.is_meta:
        pairs = _pairs().to(blocks.device)
        matrix = rows * groups * PACKED
        for flat in zip(blocks.reshape(-1, matrix), codes.view(-1, 2 * matrix).view(torch.int16), strict=True):
            for packed, both in zip(*(torch.split(each, AT_ONCE) for each in flat), strict=True):
                torch.index_select(pairs, 0, packed.int(), out=both)
    return MXFP8(codes.view(torch.float8_e4m3fn), scales.clone(memory_format=torch.contiguous_format))


def _pairs() -> torch.Tensor:
    """``[256]``: the two E4M3 codes of a byte, as one number of 16 bits."""
    codes = [*_E4M3_OF, *(code | 0x80 for code in _E4M3_OF)]
    both = [code for byte in range(256) for code in (codes[byte & 15], codes[byte >> 4])]
    return torch.tensor(both, dtype=torch.uint8, device="cpu").view(torch.int16)
