"""E4M3FN and E4M3FNUZ: the FP8 of the OCP formats, and the one that gfx94x multiplies natively.

Both have 4 exponent and 3 mantissa bits. FNUZ's exponent bias is one higher, so the same byte means half the value; its
only NaN is 0x80, which in FN is -0; FN's NaNs 0x7f and 0xff are +-240 in FNUZ. So a tensor moves from FN to FNUZ with
those three bytes replaced and its scale doubled, and no value changes (-0 becomes +0).
"""

from __future__ import annotations

import torch

from epfuse.errors import ConfigError, DtypeError
from epfuse.numerics.e8m0 import NAN_BYTE, as_e8m0_bytes
from epfuse.operands import require_plain

FN_NAN = 0x7F
FN_NEGATIVE_ZERO = 0x80
FNUZ_NAN = 0x80


def fn_codes_to_fnuz(codes: torch.Tensor) -> torch.Tensor:
    """FN bytes to the FNUZ bytes that mean half the value.

    Args:
        codes: uint8 E4M3FN codes, any shape.

    Returns:
        uint8 E4M3FNUZ codes of the same shape, a new tensor: 0x80 becomes 0x00, 0x7f and 0xff become 0x80, others stay.
    """
    is_nan = (codes & 0x7F) == FN_NAN
    return codes.masked_fill(codes == FN_NEGATIVE_ZERO, 0).masked_fill_(is_nan, FNUZ_NAN)


def double_scales(scales: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes of twice the scale: s + 1, and NaN (255) stays.

    Args:
        scales: uint8 or float8_e8m0fnu, any shape.

    Returns:
        uint8 of the same shape, a new tensor.

    Raises:
        ConfigError, LayoutError: ``scales`` is no plain tensor (`epfuse.operands.require_plain`).
        DtypeError: another dtype.
        ConfigError: a byte is 254 (2^127), whose double E8M0 can't hold.

    Host syncs: one, for the check; meant for load time.
    """
    scales = as_e8m0_bytes("scales", scales)
    if bool((scales == 254).any()):
        raise ConfigError(
            f"scales holds {int((scales == 254).sum())} bytes of 254 (2^127); E4M3FNUZ needs each scale doubled, and"
            " E8M0 ends at 254: this tensor can't be normalised for gfx94x"
        )
    return scales + (scales != NAN_BYTE).to(torch.uint8)


@torch.no_grad()
def normalize_to_fnuz(values: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MXFP8 in E4M3FN to the same numbers in E4M3FNUZ.

    Args:
        values: float8_e4m3fn, any shape.
        scales: its E8M0 scales, uint8 or float8_e8m0fnu, in any layout.

    Returns:
        float8_e4m3fnuz values and uint8 scales, new tensors of the same shapes.

    Raises:
        ConfigError, LayoutError: either is no plain tensor (`epfuse.operands.require_plain`).
        DtypeError: either has another dtype.
        ConfigError: a scale byte is 254, see `double_scales`.
    """
    require_e4m3fn(values)
    doubled = double_scales(scales)
    return fn_codes_to_fnuz(values.view(torch.uint8)).view(torch.float8_e4m3fnuz), doubled


@torch.no_grad()
def normalize_to_fnuz_(values: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`normalize_to_fnuz` in the memory of its arguments, one slice of the first dimension at a time.

    For loading: no second copy of the layer. The bytes are overwritten, so ``values`` must not be read as E4M3FN
    afterwards; nothing is overwritten if the scales are refused.

    Args:
        values: float8_e4m3fn, at least one-dimensional.
        scales: its E8M0 scales, uint8 or float8_e8m0fnu, in any layout.

    Returns:
        float8_e4m3fnuz values and uint8 scales of the same shapes, views of the arguments' memory.

    Raises:
        ConfigError, LayoutError: either is no plain tensor (`epfuse.operands.require_plain`).
        DtypeError: either has another dtype.
        ConfigError: a scale byte is 254, see `double_scales`.
    """
    require_e4m3fn(values)
    scales = as_e8m0_bytes("scales", scales)
    scales.copy_(double_scales(scales))
    codes = values.view(torch.uint8)
    for part in codes:
        part.copy_(fn_codes_to_fnuz(part))
    return codes.view(torch.float8_e4m3fnuz), scales


def require_e4m3fn(values: torch.Tensor) -> None:
    """Refuse codes whose bytes don't mean E4M3FN.

    Args:
        values: any shape.

    Raises:
        ConfigError, LayoutError: no plain tensor.
        DtypeError: another dtype.
    """
    require_plain("values", values)
    if values.dtype != torch.float8_e4m3fn:
        raise DtypeError(f"values has dtype {values.dtype}; normalisation to E4M3FNUZ starts from float8_e4m3fn")
