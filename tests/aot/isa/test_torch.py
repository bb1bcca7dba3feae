"""Instructions held against torch: a second source that we did not write, where torch has the operation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from epfuse.aot.isa.meanings import HELD_AGAINST_TORCH
from epfuse.aot.isa.registers import SCC, VCC
from tests.aot.isa.assembly import execute, floats, vector

T = torch.Tensor
LOW = 0xFFFFFFFF
LANES = 64
CORNERS = [0, 1, 2, 31, 32, 0x7F, 0x80, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x800000, 0x7FFFFFFF, 0x80000000, LOW]


def u32(value: T) -> T:
    return value & LOW


def i32(value: T) -> T:
    return (u32(value) ^ 0x80000000) - 0x80000000


def i24(value: T) -> T:
    return ((value & 0xFFFFFF) ^ 0x800000) - 0x800000


def i16(value: T) -> T:
    return ((value & 0xFFFF) ^ 0x8000) - 0x8000


def high(a: T, b: T) -> T:
    """Upper 32 bits of a product of 64, which int64 wraps."""
    return u32((a * b) >> 32)


def as_f32(value: T) -> T:
    return i32(value).int().view(torch.float32)


def as_bits(value: T) -> T:
    return u32(value.float().contiguous().view(torch.int32).long())


def low5(value: T) -> T:
    return value & 31


def field(a: T, start: T, width: T) -> T:
    return (u32(a) >> low5(start)) & ((1 << low5(width)) - 1)


def signed_field(a: T, start: T, width: T) -> T:
    width = low5(width)
    part = (i32(a) >> low5(start)) & ((1 << width) - 1)  # the sign is repeated beyond the register
    sign = torch.where(width > 0, 1 << (width - 1).clamp(min=0), 0)
    return (part ^ sign) - sign


INTEGERS: dict[str, Callable[[T, T, T], T]] = {
    "v_mov_b32_e32 v0, v1": lambda a, b, c: a,
    "v_not_b32_e32 v0, v1": lambda a, b, c: torch.bitwise_not(a),
    "v_and_b32_e32 v0, v1, v2": lambda a, b, c: torch.bitwise_and(a, b),
    "v_or_b32_e32 v0, v1, v2": lambda a, b, c: torch.bitwise_or(a, b),
    "v_xor_b32_e32 v0, v1, v2": lambda a, b, c: torch.bitwise_xor(a, b),
    "v_and_or_b32 v0, v1, v2, v3": lambda a, b, c: a & b | c,
    "v_or3_b32 v0, v1, v2, v3": lambda a, b, c: a | b | c,
    "v_bfi_b32 v0, v1, v2, v3": lambda a, b, c: a & b | ~a & c,
    "v_lshlrev_b32_e32 v0, v1, v2": lambda a, b, c: torch.bitwise_left_shift(b, low5(a)),
    "v_lshrrev_b32_e32 v0, v1, v2": lambda a, b, c: torch.bitwise_right_shift(b, low5(a)),
    "v_ashrrev_i32_e32 v0, v1, v2": lambda a, b, c: torch.bitwise_right_shift(i32(b), low5(a)),
    "v_lshlrev_b16_e32 v0, v1, v2": lambda a, b, c: (b << (a & 15)) & 0xFFFF,
    "v_lshrrev_b16_e32 v0, v1, v2": lambda a, b, c: (b & 0xFFFF) >> (a & 15),
    "v_lshl_or_b32 v0, v1, v2, v3": lambda a, b, c: a << low5(b) | c,
    "v_lshl_add_u32 v0, v1, v2, v3": lambda a, b, c: (a << low5(b)) + c,
    "v_add_lshl_u32 v0, v1, v2, v3": lambda a, b, c: u32(a + b) << low5(c),
    "v_xad_u32 v0, v1, v2, v3": lambda a, b, c: (a ^ b) + c,
    "v_bfe_u32 v0, v1, v2, v3": field,
    "v_bfe_i32 v0, v1, v2, v3": signed_field,
    "v_alignbit_b32 v0, v1, v2, v3": lambda a, b, c: (i32(a) << 32 | b) >> low5(c),
    "v_pack_b32_f16 v0, v1, v2": lambda a, b, c: (b & 0xFFFF) << 16 | a & 0xFFFF,
    "v_add_u32_e32 v0, v1, v2": lambda a, b, c: torch.add(a, b),
    "v_sub_u32_e32 v0, v1, v2": lambda a, b, c: torch.sub(a, b),
    "v_subrev_u32_e32 v0, v1, v2": lambda a, b, c: torch.sub(b, a),
    "v_add_u16_e32 v0, v1, v2": lambda a, b, c: (a + b) & 0xFFFF,
    "v_add3_u32 v0, v1, v2, v3": lambda a, b, c: a + b + c,
    "v_mul_lo_u32 v0, v1, v2": lambda a, b, c: torch.mul(i32(a).int(), i32(b).int()).long(),
    "v_mul_hi_u32 v0, v1, v2": lambda a, b, c: high(a, b),
    "v_mul_hi_i32 v0, v1, v2": lambda a, b, c: high(i32(a), i32(b)),
    "v_mul_u32_u24_e32 v0, v1, v2": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "v_mad_u32_u24 v0, v1, v2, v3": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c,
    "v_mul_i32_i24_e32 v0, v1, v2": lambda a, b, c: i24(a) * i24(b),
    "v_mad_i32_i24 v0, v1, v2, v3": lambda a, b, c: i24(a) * i24(b) + c,
    "v_min_u32_e32 v0, v1, v2": lambda a, b, c: torch.minimum(a, b),
    "v_max_u32_e32 v0, v1, v2": lambda a, b, c: torch.maximum(a, b),
    "v_min_i32_e32 v0, v1, v2": lambda a, b, c: torch.minimum(i32(a), i32(b)),
    "v_max_i32_e32 v0, v1, v2": lambda a, b, c: torch.maximum(i32(a), i32(b)),
    "v_max3_u32 v0, v1, v2, v3": lambda a, b, c: torch.maximum(torch.maximum(a, b), c),
    "v_cvt_f32_u32_e32 v0, v1": lambda a, b, c: as_bits(a.to(torch.float32)),
}
"""A line -> what torch computes of 32 bits a lane, as int64; its low 32 bits count."""

FLOATS: dict[str, Callable[[T, T, T], T]] = {
    "v_add_f32_e32 v0, v1, v2": lambda a, b, c: torch.add(a, b),
    "v_sub_f32_e32 v0, v1, v2": lambda a, b, c: torch.sub(a, b),
    "v_mul_f32_e32 v0, v1, v2": lambda a, b, c: torch.mul(a, b),
    "v_min_f32_e32 v0, v1, v2": lambda a, b, c: torch.fmin(a, b),
    "v_max_f32_e32 v0, v1, v2": lambda a, b, c: torch.fmax(a, b),
    "v_cvt_f32_f16_e32 v0, v4": lambda a, b, c: a.half().float(),
    "v_cvt_f16_f32_e32 v0, v1\nv_cvt_f32_f16_e32 v0, v0": lambda a, b, c: a.half().float(),
    "v_rcp_f32_e32 v0, v5": lambda a, b, c: torch.reciprocal(a),
    "v_rcp_iflag_f32_e32 v0, v5": lambda a, b, c: torch.reciprocal(a),
    "v_pk_add_f32 v[0:1], v[6:7], v[8:9]": lambda a, b, c: torch.add(a, b),
    "v_pk_mul_f32 v[0:1], v[6:7], v[8:9]": lambda a, b, c: torch.mul(a, b),
}
"""A line -> what torch computes of floats a, b, c; v4 has a in F16, v5 a where neither it nor its inverse is tiny."""


def name_of(line: str) -> str:
    name = line.split()[0]
    for suffix in ("_e32", "_e64", "_dpp", "_sdwa"):
        name = name.removesuffix(suffix)
    return name


def drawn(seed: int) -> list[T]:
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(3):
        values = torch.randint(0, 1 << 32, (LANES,), generator=rng)
        values[::2] = torch.tensor(CORNERS)[torch.randint(0, len(CORNERS), (LANES // 2,), generator=rng)]
        found.append(values)
    return found


@pytest.mark.parametrize("line", INTEGERS)
def test_integers(line: str) -> None:
    for seed in range(2):
        a, b, c = drawn(seed)
        wave = execute(line, vectors={0: 0, 1: a.numpy(), 2: b.numpy(), 3: c.numpy()})
        np.testing.assert_array_equal(vector(wave), u32(INTEGERS[line](a, b, c)).numpy().astype(np.uint32))


def drawn_floats() -> list[T]:
    rng = torch.Generator().manual_seed(5)
    found = [
        torch.randn(LANES, generator=rng) * torch.exp2(torch.randint(-12, 12, (LANES,), generator=rng).float())
        for _ in range(3)
    ]
    found[0][:8] = torch.tensor([torch.nan, 1.0, torch.inf, -torch.inf, 65504.0, 2.0**-24, 2.0**-25, 3.0])
    found[1][:8] = torch.tensor([1.0, torch.nan, -torch.inf, 1.0, 65520.0, 2.0**-25, 2.0**-24, 3.0])
    return found


@pytest.mark.parametrize("line", FLOATS)
def test_floats(line: str) -> None:
    a, b, c = drawn_floats()
    halves = a.half().view(torch.int16).long() & 0xFFFF
    vectors = {1: a.numpy(), 2: b.numpy(), 3: c.numpy(), 4: halves.numpy(), 5: a.numpy()}
    vectors |= {6: a.numpy(), 7: a.numpy(), 8: b.numpy(), 9: b.numpy()}
    wave = execute(line, vectors=vectors)
    wanted = FLOATS[line](a, b, c)
    np.testing.assert_array_equal(floats(wave), wanted.numpy())
    if "v[0:1]" in line:
        np.testing.assert_array_equal(floats(wave, 1), wanted.numpy())


def test_fused_multiply_add_is_exact_in_double() -> None:
    a, b, c = (torch.randint(-2000, 2001, (LANES,), generator=torch.Generator().manual_seed(each)) for each in range(3))
    wanted = torch.addcmul(c.double(), a.double(), b.double()).float().numpy()
    vectors = {1: a.float().numpy(), 2: b.float().numpy(), 3: c.float().numpy(), 0: c.float().numpy()}
    vectors |= {4: a.float().numpy(), 5: a.float().numpy(), 6: b.float().numpy(), 7: b.float().numpy()}
    vectors |= {8: c.float().numpy(), 9: c.float().numpy()}
    for line in (
        "v_fma_f32 v0, v1, v2, v3",
        "v_fmac_f32_e32 v0, v1, v2",
        "v_pk_fma_f32 v[0:1], v[4:5], v[6:7], v[8:9]",
    ):
        np.testing.assert_array_equal(floats(execute(line, vectors=vectors)), wanted)


def test_exponential_and_scaling() -> None:
    x = torch.linspace(-126, 127, LANES)
    np.testing.assert_allclose(
        floats(execute("v_exp_f32_e32 v0, v1", vectors={1: x.numpy()})), torch.exp2(x).numpy(), rtol=2.0**-22
    )
    power = torch.randint(-100, 100, (LANES,), generator=torch.Generator().manual_seed(0))
    wave = execute("v_ldexp_f32 v0, v1, v2", vectors={1: np.float32(1.375), 2: u32(power).numpy()})
    np.testing.assert_array_equal(floats(wave), torch.ldexp(torch.full((LANES,), 1.375), power).numpy())
    numbers = torch.tensor([0.0, 0.5, 3.99, 2.0**24, 2.0**31, 2.0**32 - 256, 1.0, 77.7])
    wave = execute("v_cvt_u32_f32_e32 v0, v1", vectors={1: numbers.repeat(8).numpy()})
    np.testing.assert_array_equal(vector(wave)[:8], numbers.long().numpy())


ORDERS = {"lt": torch.lt, "eq": torch.eq, "le": torch.le, "gt": torch.gt, "ne": torch.ne, "ge": torch.ge}
READINGS = {"i32": i32, "u32": u32, "i16": i16, "u16": lambda value: value & 0xFFFF}


@pytest.mark.parametrize("order", ORDERS)
def test_comparisons_choose_what_torch_chooses(order: str) -> None:
    a, b, _ = drawn(7)
    b[::3] = a[::3]
    for reading, read in READINGS.items():
        line = f"v_cmp_{order}_{reading}_e32 vcc, v1, v2\ns_nop 3\nv_cndmask_b32_e32 v0, v3, v4, vcc"
        wave = execute(line, vectors={1: a.numpy(), 2: b.numpy(), 3: 10, 4: 20})
        wanted = torch.where(ORDERS[order](read(a), read(b)), 20, 10)
        np.testing.assert_array_equal(vector(wave), wanted.numpy())
    line = f"v_cmp_{order}_i64_e32 vcc, v[1:2], v[3:4]\ns_nop 3\nv_cndmask_b32_e32 v0, v5, v6, vcc"
    wave = execute(line, vectors={1: a.numpy(), 2: b.numpy(), 3: b.numpy(), 4: b.numpy(), 5: 10, 6: 20})
    wide = ORDERS[order](i32(b) << 32 | a, i32(b) << 32 | b)
    np.testing.assert_array_equal(vector(wave), torch.where(wide, 20, 10).numpy())


FLOAT_ORDERS: dict[str, Callable[[T, T], T]] = {
    "lt": torch.lt,
    "eq": torch.eq,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "neq": torch.ne,
    "lg": lambda a, b: torch.lt(a, b) | torch.gt(a, b),
    "nlt": lambda a, b: ~torch.lt(a, b),
    "nle": lambda a, b: ~torch.le(a, b),
    "ngt": lambda a, b: ~torch.gt(a, b),
    "nge": lambda a, b: ~torch.ge(a, b),
    "nlg": lambda a, b: ~(torch.lt(a, b) | torch.gt(a, b)),
    "o": lambda a, b: ~(torch.isnan(a) | torch.isnan(b)),
    "u": lambda a, b: torch.isnan(a) | torch.isnan(b),
}


@pytest.mark.parametrize("order", FLOAT_ORDERS)
def test_float_comparisons(order: str) -> None:
    a, b, _ = drawn_floats()
    b[::3] = a[::3]
    wave = execute(f"v_cmp_{order}_f32_e32 vcc, v1, v2", vectors={1: a.numpy(), 2: b.numpy()})
    assert wave.pair(VCC) == sum(1 << int(lane) for lane in FLOAT_ORDERS[order](a, b).nonzero())


WIDE: dict[str, Callable[[T, T], T]] = {
    "v_lshlrev_b64 v[0:1], 7, v[2:3]": lambda a, b: a << 7,
    "v_lshrrev_b64 v[0:1], 9, v[2:3]": lambda a, b: (a >> 9) & ((1 << 55) - 1),
    "v_ashrrev_i64 v[0:1], 9, v[2:3]": lambda a, b: a >> 9,
    "v_lshl_add_u64 v[0:1], v[2:3], 3, v[4:5]": lambda a, b: (a << 3) + b,
    "v_mov_b64_e32 v[0:1], v[2:3]": lambda a, b: a,
    "v_mad_u64_u32 v[0:1], s[0:1], v2, v4, v[2:3]": lambda a, b: u32(a) * u32(b) + a,
    "v_add_co_u32_e32 v0, vcc, v2, v4\ns_nop 3\nv_addc_co_u32_e32 v1, vcc, v3, v5, vcc": torch.add,
    "v_sub_co_u32_e32 v0, vcc, v2, v4\ns_nop 3\nv_subb_co_u32_e32 v1, vcc, v3, v5, vcc": torch.sub,
    "v_subrev_co_u32_e32 v0, vcc, v4, v2\ns_nop 3\nv_subbrev_co_u32_e32 v1, vcc, v5, v3, vcc": torch.sub,
}


@pytest.mark.parametrize("line", WIDE)
def test_wide_integers(line: str) -> None:
    low, top, other = drawn(3)
    a, b = i32(top) << 32 | low, i32(other) << 32 | top
    vectors = {2: low.numpy(), 3: top.numpy(), 4: top.numpy(), 5: other.numpy()}
    wave = execute(line, vectors=vectors)
    found = (
        torch.from_numpy(vector(wave, 0).astype(np.int64))
        | i32(torch.from_numpy(vector(wave, 1).astype(np.int64))) << 32
    )
    np.testing.assert_array_equal(found.numpy(), WIDE[line](a, b).numpy())


def test_a_division_is_torchs() -> None:
    from tests.aot.isa.test_vector import DIVISION

    a, b, _ = drawn_floats()
    wave = execute(DIVISION, vectors={1: a.numpy(), 2: b.numpy()})
    np.testing.assert_array_equal(floats(wave), torch.div(a, b).numpy())


def test_bytes_are_gathered() -> None:
    """v_perm_b32 with the eight bytes, whose numbers are what torch.gather takes."""
    a, b, c = drawn(9)
    eight = torch.cat([each[:, None] >> torch.arange(0, 32, 8) & 255 for each in (b, a)], dim=1)
    chosen = c[:, None] >> torch.arange(0, 32, 8) & 7
    wanted = (torch.gather(eight, 1, chosen) << torch.arange(0, 32, 8)).sum(1)
    selector = (chosen << torch.arange(0, 32, 8)).sum(1)
    wave = execute("v_perm_b32 v0, v1, v2, v3", vectors={1: a.numpy(), 2: b.numpy(), 3: selector.numpy()})
    np.testing.assert_array_equal(vector(wave), wanted.numpy())


def test_lanes_are_gathered() -> None:
    a, b, _ = drawn(11)
    source = torch.randint(0, LANES, (LANES,), generator=torch.Generator().manual_seed(1))
    wave = execute("ds_bpermute_b32 v0, v1, v2\ns_waitcnt lgkmcnt(0)", vectors={1: (4 * source).numpy(), 2: a.numpy()})
    np.testing.assert_array_equal(vector(wave), torch.gather(a, 0, source).numpy())
    wave = execute("ds_swizzle_b32 v0, v2 offset:swizzle(SWAP,8)\ns_waitcnt lgkmcnt(0)", vectors={2: b.numpy()})
    np.testing.assert_array_equal(vector(wave), b[torch.arange(LANES) ^ 8].numpy())


def test_lds_is_gathered_scattered_and_added_to() -> None:
    order = torch.randperm(LANES, generator=torch.Generator().manual_seed(2))
    a, b, _ = drawn(13)
    body = """
    ds_write_b32 v1, v2
    s_waitcnt lgkmcnt(0)
    ds_read_b32 v0, v3
    s_waitcnt lgkmcnt(0)
    """
    lanes = torch.arange(LANES)
    wave = execute(body, vectors={1: (4 * order).numpy(), 2: a.numpy(), 3: (4 * lanes).numpy()})
    np.testing.assert_array_equal(vector(wave), torch.empty_like(a).scatter_(0, order, a).numpy())
    places = order // 4
    wave = execute(
        "ds_add_u32 v1, v2\ns_waitcnt lgkmcnt(0)\nds_read_b32 v0, v3\ns_waitcnt lgkmcnt(0)",
        vectors={1: (4 * places).numpy(), 2: b.numpy(), 3: (4 * lanes).numpy()},
    )
    np.testing.assert_array_equal(vector(wave), u32(torch.zeros_like(b).index_add_(0, places, b)).numpy())


SCALARS: dict[str, Callable[[T, T], T]] = {
    "s_add_i32": torch.add,
    "s_add_u32": torch.add,
    "s_sub_i32": torch.sub,
    "s_sub_u32": torch.sub,
    "s_mul_i32": lambda a, b: torch.mul(i32(a).int(), i32(b).int()).long(),
    "s_mul_hi_u32": high,
    "s_mul_hi_i32": lambda a, b: high(i32(a), i32(b)),
    "s_min_i32": lambda a, b: torch.minimum(i32(a), i32(b)),
    "s_max_i32": lambda a, b: torch.maximum(i32(a), i32(b)),
    "s_min_u32": torch.minimum,
    "s_max_u32": torch.maximum,
    "s_and_b32": torch.bitwise_and,
    "s_or_b32": torch.bitwise_or,
    "s_xor_b32": torch.bitwise_xor,
    "s_andn2_b32": lambda a, b: a & ~b,
    "s_lshl_b32": lambda a, b: torch.bitwise_left_shift(a, low5(b)),
    "s_lshr_b32": lambda a, b: torch.bitwise_right_shift(a, low5(b)),
    "s_ashr_i32": lambda a, b: torch.bitwise_right_shift(i32(a), low5(b)),
    "s_lshl1_add_u32": lambda a, b: (a << 1) + b,
    "s_lshl2_add_u32": lambda a, b: (a << 2) + b,
    "s_lshl3_add_u32": lambda a, b: (a << 3) + b,
    "s_lshl4_add_u32": lambda a, b: (a << 4) + b,
    "s_abs_i32": lambda a, b: torch.abs(i32(a)),
    "s_not_b32": lambda a, b: torch.bitwise_not(a),
    "s_mov_b32": lambda a, b: a,
}


@pytest.mark.parametrize("name", SCALARS)
def test_scalars(name: str) -> None:
    a, b, _ = drawn(17)
    one = name in ("s_abs_i32", "s_not_b32", "s_mov_b32")
    for x, y in zip(a[:8], b[4:12], strict=True):
        line = f"{name} s0, s2" if one else f"{name} s0, s2, s3"
        wave = execute(line, scalars={2: int(x), 3: int(y)})
        assert wave.scalars[0] == int(u32(SCALARS[name](x, y)))


SCALAR_ORDERS = {name: test for name, test in ORDERS.items() if name != "ne"} | {"lg": torch.ne}


@pytest.mark.parametrize("order", SCALAR_ORDERS)
def test_scalar_comparisons(order: str) -> None:
    a, b, _ = drawn(19)
    for reading in ("i32", "u32"):
        read = READINGS[reading]
        for x, y in [*zip(a[:6], b[:6], strict=True), (a[0], a[0])]:
            wave = execute(f"s_cmp_{order}_{reading} s2, s3", scalars={2: int(x), 3: int(y)})
            assert wave.scalars[SCC] == int(SCALAR_ORDERS[order](read(x), read(y)))


HERE = (
    {name_of(line) for table in (INTEGERS, FLOATS, WIDE) for part in table for line in part.split("\n")}
    | set(SCALARS)
    | {f"s_cmp_{order}_{reading}" for order in SCALAR_ORDERS for reading in ("i32", "u32")}
    | {f"v_cmp_{order}_{reading}" for order in ORDERS for reading in (*READINGS, "i64")}
    | {f"v_cmp_{order}_f32" for order in FLOAT_ORDERS}
    | {"v_fma_f32", "v_fmac_f32", "v_pk_fma_f32", "v_exp_f32", "v_ldexp_f32", "v_cvt_u32_f32", "v_cndmask_b32"}
    | {"v_div_scale_f32", "v_div_fmas_f32", "v_div_fixup_f32", "v_perm_b32"}
    | {"ds_bpermute_b32", "ds_swizzle_b32", "ds_read_b32", "ds_write_b32", "ds_add_u32"}
) - {"s_nop"}


def test_the_table_of_meanings_names_these() -> None:
    assert HELD_AGAINST_TORCH - {"v_cvt_pk_f32_fp8"} == HERE
