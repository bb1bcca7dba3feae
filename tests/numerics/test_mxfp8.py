"""encode and decode against the formats' definitions and against torch's own dtypes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epfuse.errors import DtypeError, ShapeError
from epfuse.numerics.mxfp8 import ScaleRounding, decode, encode
from tests.numerics.formats import (
    FINITE_ROWS,
    FORMATS,
    corner_rows,
    e4m3_value,
    e8m0_value,
    expected_encoding,
    same,
)

ROUNDINGS = list(ScaleRounding)
SOURCES = [torch.float32, torch.bfloat16, torch.float16]
FLOATS32 = st.floats(allow_nan=False, allow_infinity=False, width=32)
BLOCKS = st.lists(FLOATS32, min_size=32, max_size=32)


def every_code_and_scale(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``[256, 256]`` values, row s holding all codes, and ``[256, 8]`` scales, byte s in row s."""
    codes = torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 8).contiguous()
    return codes.to(device).view(dtype), scales.to(device)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("target", [torch.float64, torch.float32, torch.bfloat16])
def test_decode_of_every_code_with_every_scale(dtype: torch.dtype, target: torch.dtype, device: torch.device) -> None:
    values, scales = every_code_and_scale(dtype, device)
    out = decode(values, scales, target)
    wide = torch.float64 if target == torch.float64 else torch.float32
    torch_says = values.to(wide) * scales.view(torch.float8_e8m0fnu).to(wide).repeat_interleave(32, 1)
    assert same(out, torch_says.to(target))
    definition = torch.tensor(
        [[e4m3_value(code, dtype) * e8m0_value(byte) for code in range(256)] for byte in range(256)],
        dtype=torch.float64,
    )
    assert same(out, definition.to(target))


@pytest.mark.parametrize(("dtype", "first_exact"), [(torch.float8_e4m3fn, 3), (torch.float8_e4m3fnuz, 4)])
def test_bf16_is_exact_from_the_stated_scale_on(dtype: torch.dtype, first_exact: int, device: torch.device) -> None:
    values, scales = every_code_and_scale(dtype, device)
    exact, bf16 = decode(values, scales, torch.float64), decode(values, scales, torch.bfloat16).double()
    lossy = (bf16 != exact) & ~exact.isnan() & ~bf16.isinf()
    assert lossy[:first_exact].any(1).all()
    assert not lossy[first_exact:].any()
    assert torch.equal(bf16.isinf(), exact.abs() >= 2.0**128)


def test_decode_takes_scales_as_torch_e8m0(device: torch.device) -> None:
    values, scales = every_code_and_scale(torch.float8_e4m3fn, device)
    assert same(decode(values, scales), decode(values, scales.view(torch.float8_e8m0fnu)))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("source", SOURCES)
def test_encode_of_corner_cases_is_the_nearest_value(
    rounding: ScaleRounding, source: torch.dtype, device: torch.device
) -> None:
    rows = corner_rows(source)[:FINITE_ROWS]
    values, scales = encode(rows.to(device), rounding)
    for row, codes, row_scales in zip(rows, values.view(torch.uint8).cpu(), scales.cpu(), strict=True):
        for b in range(2):
            block = slice(32 * b, 32 * b + 32)
            assert (codes[block].tolist(), int(row_scales[b])) == expected_encoding(row[block].tolist(), rounding)


@settings(max_examples=60, deadline=None)
@given(BLOCKS, st.sampled_from(ROUNDINGS))
def test_encode_of_any_block_is_the_nearest_value(block: list[float], rounding: ScaleRounding) -> None:
    values, scales = encode(torch.tensor(block), rounding)
    assert (values.view(torch.uint8).tolist(), int(scales)) == expected_encoding(block, rounding)


@settings(max_examples=60, deadline=None)
@given(BLOCKS, st.sampled_from(ROUNDINGS))
def test_error_is_at_most_half_a_step_unless_saturated(block: list[float], rounding: ScaleRounding) -> None:
    x = torch.tensor(block)
    values, scales = encode(x, rounding)
    scale = e8m0_value(int(scales))
    for got, wanted in zip(decode(values, scales, torch.float64).tolist(), x.double().tolist(), strict=True):
        if abs(wanted) > 448 * scale:
            assert rounding is ScaleRounding.FLOOR
            assert got == math.copysign(448 * scale, wanted)
        else:
            step = scale * 2.0 ** (max(math.frexp(abs(wanted) / scale)[1] - 1, -6) - 3)
            assert abs(got - wanted) <= step / 2


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_canonical_encodings_survive_decode_and_encode(rounding: ScaleRounding, device: torch.device) -> None:
    # canonical: the byte is what the block's largest code asks for, or 0, where smaller exponents are clamped to
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 127, (248, 32), generator=g) | torch.randint(0, 2, (248, 32), generator=g) * 128
    codes[:, 3] = 0x7E if rounding is ScaleRounding.FLOOR else 0x77
    codes[247, (codes[247] & 0x7F) > 0x77] = 0x77  # larger codes would be beyond float32 there
    codes[0] &= 0x87  # byte 0 with subnormal codes only
    scales = torch.arange(248, dtype=torch.uint8).view(-1, 1)
    rows = 247 if rounding is ScaleRounding.FLOOR else 248
    values = codes.to(torch.uint8)[:rows].to(device).view(torch.float8_e4m3fn)
    again, scales_again = encode(decode(values, scales[:rows].to(device)), rounding)
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(scales_again.cpu(), scales[:rows])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=32, max_size=32),
    st.integers(-60, 60),
    st.sampled_from(ROUNDINGS),
)
def test_a_power_of_two_only_moves_the_scale(block: list[float], power: int, rounding: ScaleRounding) -> None:
    x = torch.tensor(block)
    values, scales = encode(x, rounding)
    moved_values, moved_scales = encode(x * 2.0**power, rounding)
    assert torch.equal(moved_values.view(torch.uint8), values.view(torch.uint8))
    assert int(moved_scales) == int(scales) + power


@pytest.mark.parametrize("amax", [256.0, 447.0, 448.0, 449.0, 464.0, 480.0, 511.9])
def test_floor_and_ceil_differ_exactly_above_448(amax: float) -> None:
    x = torch.linspace(-1, 1, 32) * amax
    floor_values, floor_scale = encode(x, ScaleRounding.FLOOR)
    ceil_values, ceil_scale = encode(x, ScaleRounding.CEIL)
    assert int(floor_scale) == 127
    assert int(ceil_scale) == (128 if amax > 448 else 127)
    nearest = float(torch.tensor(min(amax, 448.0)).to(torch.float8_e4m3fn))
    assert float(decode(floor_values, floor_scale).max()) == nearest
    assert float(decode(ceil_values, ceil_scale).abs().max()) <= 448 * 2.0 ** (int(ceil_scale) - 127)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_block_with_a_non_finite_value_is_nan_and_its_neighbour_is_not(
    rounding: ScaleRounding, source: torch.dtype, device: torch.device
) -> None:
    rows = corner_rows(source)[FINITE_ROWS:].to(device)
    values, scales = encode(rows, rounding)
    decoded = decode(values, scales)
    broken = ~rows.isfinite().view(-1, 2, 32).all(2)
    assert torch.equal(broken.sum(1).cpu(), torch.ones(4, dtype=torch.int64))
    assert torch.equal(scales == 255, broken)
    assert torch.equal(decoded.view(-1, 2, 32).isnan(), broken.unsqueeze(2).expand(-1, 2, 32))
    assert (values.view(torch.uint8).view(-1, 2, 32)[broken] == 0x7F).all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_zeros_decode_to_zeros_of_their_sign(rounding: ScaleRounding, device: torch.device) -> None:
    x = torch.zeros(2, 64, device=device)
    x[1, ::3] = -0.0
    values, scales = encode(x, rounding)
    assert (scales == 0).all()
    assert same(decode(values, scales, torch.bfloat16), x)


def test_encode_keeps_leading_dimensions_and_takes_strided_input() -> None:
    x = torch.randn(3, 64, 5).transpose(1, 2)
    values, scales = encode(x)
    assert values.shape == (3, 5, 64)
    assert scales.shape == (3, 5, 2)
    assert values.is_contiguous()
    contiguous_values, contiguous_scales = encode(x.contiguous())
    assert torch.equal(values.view(torch.uint8), contiguous_values.view(torch.uint8))
    assert torch.equal(scales, contiguous_scales)


def test_encode_and_decode_refuse_what_they_do_not_document() -> None:
    with pytest.raises(ShapeError, match=r"x has shape \(2, 33\)"):
        encode(torch.zeros(2, 33))
    with pytest.raises(ShapeError, match="x has shape"):
        encode(torch.tensor(1.0))
    with pytest.raises(DtypeError, match=r"x has dtype torch\.float64"):
        encode(torch.zeros(32, dtype=torch.float64))
    values, scales = encode(torch.zeros(2, 32))
    with pytest.raises(ShapeError, match="scales has shape"):
        decode(values, scales[:1])
    with pytest.raises(DtypeError, match=r"values has dtype torch\.uint8"):
        decode(values.view(torch.uint8), scales)
    with pytest.raises(DtypeError, match=r"scales has dtype torch\.float32"):
        decode(values, scales.float())
    with pytest.raises(DtypeError, match=r"dtype is torch\.float16"):
        decode(values, scales, torch.float16)
