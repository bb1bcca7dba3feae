"""Vector arithmetic with results in vector registers of 32 bits: what each instruction does to the bits of a lane."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from epfuse.aot.isa import floats
from epfuse.aot.isa.floats import bits, f32
from epfuse.aot.isa.operands import Value

U64 = np.uint64
_31, _15 = np.uint32(31), np.uint32(15)
_LOW24, _LOW16 = np.uint32(0xFFFFFF), np.uint32(0xFFFF)


@dataclass(frozen=True)
class Vector:
    """A vector instruction.

    Attributes:
        function: of the sources' bits; gives the result's.
        sources: how many.
        floating: whether the sources are floats, which may have sign modifiers.
        controls: sources that say where bits go, for instructions that only move bits; None for those that compute.
        transcendental: whether it runs on the transcendental unit.
        keeps: whether it reads its own destination, as the last source.
        clamps: what ``clamp`` makes of it; None if that is not known.
    """

    function: Callable[..., Value]
    sources: int
    floating: bool = False
    controls: tuple[int, ...] | None = None
    transcendental: bool = False
    keeps: bool = False
    clamps: Callable[..., Value] | None = None


def _signed(value: Value) -> Value:
    return value.view(np.int32)


def _unsigned(value: Value) -> Value:
    return np.asarray(value).view(np.uint32)


def _high(a: Value, b: Value) -> Value:
    return (a.astype(U64) * b.astype(U64) >> U64(32)).astype(np.uint32)


def _high_signed(a: Value, b: Value) -> Value:
    return _unsigned((_signed(a).astype(np.int64) * _signed(b).astype(np.int64) >> 32).astype(np.int32))


def _signed24(value: Value) -> Value:
    """The low 24 bits extended by their sign, as a pattern of 32 bits."""
    return _unsigned(_signed(value << np.uint32(8)) >> 8)


def _field(a: Value, start: Value, width: Value) -> Value:
    return a >> (start & _31) & ((np.uint32(1) << (width & _31)) - np.uint32(1))


def _field_signed(a: Value, start: Value, width: Value) -> Value:
    width = width & _31
    # bits beyond the register repeat the sign
    part = _unsigned(_signed(a) >> _signed(start & _31)) & ((np.uint32(1) << width) - np.uint32(1))
    sign = np.where(width > 0, np.uint32(1) << (width - np.uint32(1) & _31), np.uint32(0))
    return (part ^ sign) - sign


def _reversed(a: Value) -> Value:
    for shift, part in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        a = (a >> np.uint32(shift) & np.uint32(part)) | ((a & np.uint32(part)) << np.uint32(shift))
    return a


def _permuted(a: Value, b: Value, selector: Value) -> Value:
    """Bytes of the eight in ``a`` (high) and ``b`` (low), by four selectors; from 8 on they are constants or signs."""
    shape = np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(selector))
    high, low, chosen = (
        np.ascontiguousarray(each if np.shape(each) == shape else np.broadcast_to(each, shape))
        .view(np.uint8)
        .reshape(-1, 4)
        for each in (a, b, selector)
    )
    table = np.full((len(low), 14), 255, np.uint8)
    table[:, :4], table[:, 4:8] = low, high
    table[:, 8:12] = np.where(table[:, 1:8:2] & 128, 255, 0)  # the sign of every second byte
    table[:, 12] = 0
    result = np.take_along_axis(table, np.minimum(chosen, 13).astype(np.intp), axis=1)
    return result.view(np.uint32).reshape(shape)


def _aligned(a: Value, b: Value, shift: Value) -> Value:
    """32 bits of the 64 in ``a`` (high) and ``b`` (low), from bit ``shift`` on."""
    both = (a.astype(U64) << U64(32)) | b.astype(U64)
    return np.asarray(both >> (shift & _31).astype(U64)).astype(np.uint32)


def _unsigned_difference(a: Value, b: Value) -> Value:
    return np.where(a < b, np.uint32(0), a - b)


def _unsigned_sum(a: Value, b: Value) -> Value:
    return np.where(a + b < a, np.uint32(0xFFFFFFFF), a + b)


def _min_signed(a: Value, b: Value) -> Value:
    return _unsigned(np.minimum(_signed(a), _signed(b)))


def _max_signed(a: Value, b: Value) -> Value:
    return _unsigned(np.maximum(_signed(a), _signed(b)))


def _mixed_low(a: Value, b: Value, c: Value, kept: Value) -> Value:
    return (kept & ~_LOW16) | floats.to_half(floats.fused(a, b, c))


def _mixed_high(a: Value, b: Value, c: Value, kept: Value) -> Value:
    return (kept & _LOW16) | floats.to_half(floats.fused(a, b, c)) << np.uint32(16)


def _bitcount(a: Value, b: Value) -> Value:
    return np.bitwise_count(a).astype(np.uint32) + b


VECTORS: dict[str, Vector] = {
    "v_mov_b32": Vector(lambda a: a, 1, controls=()),
    "v_accvgpr_read_b32": Vector(lambda a: a, 1, controls=()),
    "v_accvgpr_write_b32": Vector(lambda a: a, 1, controls=()),
    "v_accvgpr_mov_b32": Vector(lambda a: a, 1, controls=()),
    "v_not_b32": Vector(lambda a: ~a, 1),
    "v_bfrev_b32": Vector(_reversed, 1, controls=()),
    "v_and_b32": Vector(lambda a, b: a & b, 2),
    "v_or_b32": Vector(lambda a, b: a | b, 2),
    "v_xor_b32": Vector(lambda a, b: a ^ b, 2),
    "v_and_or_b32": Vector(lambda a, b, c: a & b | c, 3),
    "v_or3_b32": Vector(lambda a, b, c: a | b | c, 3, controls=()),
    "v_bfi_b32": Vector(lambda a, b, c: a & b | ~a & c, 3, controls=(0,)),
    "v_lshlrev_b32": Vector(lambda a, b: b << (a & _31), 2, controls=(0,)),
    "v_lshrrev_b32": Vector(lambda a, b: b >> (a & _31), 2, controls=(0,)),
    "v_ashrrev_i32": Vector(lambda a, b: _unsigned(_signed(b) >> _signed(a & _31)), 2, controls=(0,)),
    "v_lshlrev_b16": Vector(lambda a, b: (b << (a & _15)) & _LOW16, 2, controls=(0,)),
    "v_lshrrev_b16": Vector(lambda a, b: (b & _LOW16) >> (a & _15), 2, controls=(0,)),
    "v_lshl_or_b32": Vector(lambda a, b, c: a << (b & _31) | c, 3, controls=(1,)),
    "v_bfe_u32": Vector(_field, 3, controls=(1, 2)),
    "v_bfe_i32": Vector(_field_signed, 3, controls=(1, 2)),
    "v_perm_b32": Vector(_permuted, 3, controls=(2,)),
    "v_alignbit_b32": Vector(_aligned, 3, controls=(2,)),
    "v_pack_b32_f16": Vector(lambda a, b: a & _LOW16 | b << np.uint32(16), 2, controls=()),
    "v_bcnt_u32_b32": Vector(_bitcount, 2),
    "v_add_u32": Vector(lambda a, b: a + b, 2, clamps=_unsigned_sum),
    "v_sub_u32": Vector(lambda a, b: a - b, 2, clamps=_unsigned_difference),
    "v_subrev_u32": Vector(lambda a, b: b - a, 2, clamps=lambda a, b: _unsigned_difference(b, a)),
    "v_add_u16": Vector(lambda a, b: a + b & _LOW16, 2),
    "v_add3_u32": Vector(lambda a, b, c: a + b + c, 3),
    "v_add_lshl_u32": Vector(lambda a, b, c: a + b << (c & _31), 3),
    "v_lshl_add_u32": Vector(lambda a, b, c: (a << (b & _31)) + c, 3),
    "v_xad_u32": Vector(lambda a, b, c: (a ^ b) + c, 3),
    "v_mul_lo_u32": Vector(lambda a, b: a * b, 2),
    "v_mul_hi_u32": Vector(_high, 2),
    "v_mul_hi_i32": Vector(_high_signed, 2),
    "v_mul_u32_u24": Vector(lambda a, b: (a & _LOW24) * (b & _LOW24), 2),
    "v_mad_u32_u24": Vector(lambda a, b, c: (a & _LOW24) * (b & _LOW24) + c, 3),
    "v_mul_i32_i24": Vector(lambda a, b: _signed24(a) * _signed24(b), 2),
    "v_mad_i32_i24": Vector(lambda a, b, c: _signed24(a) * _signed24(b) + c, 3),
    "v_min_u32": Vector(lambda a, b: np.minimum(a, b), 2),
    "v_max_u32": Vector(lambda a, b: np.maximum(a, b), 2),
    "v_min_i32": Vector(_min_signed, 2),
    "v_max_i32": Vector(_max_signed, 2),
    "v_max3_u32": Vector(lambda a, b, c: np.maximum(np.maximum(a, b), c), 3),
    "v_add_f32": Vector(lambda a, b: bits(f32(a) + f32(b)), 2, floating=True),
    "v_sub_f32": Vector(lambda a, b: bits(f32(a) - f32(b)), 2, floating=True),
    "v_mul_f32": Vector(lambda a, b: bits(f32(a) * f32(b)), 2, floating=True),
    "v_min_f32": Vector(floats.minimum, 2, floating=True),
    "v_max_f32": Vector(floats.maximum, 2, floating=True),
    "v_fma_f32": Vector(floats.fused, 3, floating=True),
    "v_fmac_f32": Vector(floats.fused, 2, floating=True, keeps=True),
    "v_fma_mixlo_f16": Vector(_mixed_low, 3, floating=True, keeps=True),
    "v_fma_mixhi_f16": Vector(_mixed_high, 3, floating=True, keeps=True),
    "v_ldexp_f32": Vector(floats.scaled, 2, floating=True),
    "v_div_fixup_f32": Vector(floats.division_fixup, 3, floating=True),
    "v_rcp_f32": Vector(floats.reciprocal, 1, floating=True, transcendental=True),
    "v_rcp_iflag_f32": Vector(floats.reciprocal, 1, floating=True, transcendental=True),
    "v_exp_f32": Vector(floats.exponential, 1, floating=True, transcendental=True),
    "v_cvt_u32_f32": Vector(floats.to_unsigned, 1, floating=True),
    "v_cvt_f32_u32": Vector(floats.from_unsigned, 1),
    "v_cvt_f16_f32": Vector(floats.to_half, 1, floating=True),
    "v_cvt_f32_f16": Vector(floats.from_half, 1),
}
"""By the opcode without the encoding's suffix."""
