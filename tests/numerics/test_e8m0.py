"""Scale bytes against torch's float8_e8m0fnu and exact logarithms."""

from __future__ import annotations

import math

import pytest
import torch

from epfuse.errors import DtypeError
from epfuse.numerics.e8m0 import ScaleRounding, decode_scales, inverse_scales, magnitude_bits, scale_bytes
from tests.numerics.formats import e8m0_value, same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_byte_decodes_exactly(dtype: torch.dtype, device: torch.device) -> None:
    scales = torch.arange(256, dtype=torch.uint8, device=device)
    expected = torch.tensor([e8m0_value(s) for s in range(256)], dtype=torch.float64)
    assert same(decode_scales(scales, dtype), expected)
    assert same(decode_scales(scales.view(torch.float8_e8m0fnu), dtype), expected)
    with pytest.raises(DtypeError, match=r"scales has dtype torch\.int32"):
        decode_scales(scales.int(), dtype)


def test_inverse_is_exact() -> None:
    scales = torch.arange(254, dtype=torch.int32)
    expected = torch.tensor([1 / e8m0_value(s) for s in range(254)], dtype=torch.float64)
    assert torch.equal(inverse_scales(scales).double(), expected)


@pytest.mark.parametrize("rounding", list(ScaleRounding))
def test_byte_around_every_boundary(rounding: ScaleRounding, device: torch.device) -> None:
    # the three float32 numbers around each power of two and around 1.75 of it, where a rounded logarithm slips
    tops = torch.tensor([m * 2.0**e for e in range(-149, 128) for m in (1.0, 1.75)], dtype=torch.float64).float()
    up, down = torch.tensor(float("inf")), torch.tensor(0.0)
    amax = torch.cat([tops, tops.nextafter(up), tops.nextafter(down)])
    amax = amax[amax.isfinite() & (amax > 0)]
    got = scale_bytes(magnitude_bits(amax.to(device)), rounding).tolist()
    for byte, value in zip(got, amax.double().tolist(), strict=True):
        mantissa, exponent = math.frexp(value)
        expected = exponent - 9 + (rounding is ScaleRounding.CEIL and mantissa > 0.875)
        assert byte == max(expected + 127, 0), value
    assert max(got) == (246 if rounding is ScaleRounding.FLOOR else 247)


def test_non_finite_blocks_get_the_nan_byte() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), torch.finfo(torch.float32).max])
    for rounding in ScaleRounding:
        assert (scale_bytes(magnitude_bits(x), rounding) == 255).tolist() == [True, True, True, False]
