"""MXFP8 to BF16 in registers: every code with every scale byte, in both kinds of E4M3."""

from __future__ import annotations

import pytest
import torch

from epfuse.numerics.mxfp8 import MXFP8
from tests.stages.dequantize_kernel import dequantize_kernel

SMALLEST_NORMAL = 2.0**-126


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN and infinity, in the interpreter
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=["fn", "fnuz"])
def test_every_code_with_every_scale(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and (dtype == torch.float8_e4m3fnuz) != (torch.version.hip is not None):
        pytest.skip("not this GPU's E4M3")
    codes = torch.arange(256, dtype=torch.uint8, device=device).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8, device=device)[:, None].repeat(1, 8)
    out = torch.full((256, 256), torch.nan, dtype=torch.bfloat16, device=device)
    dequantize_kernel[(1,)](codes.view(dtype), scales, out, ROWS=256, COLUMNS=256)
    true = MXFP8(codes.view(dtype), scales).dequantize(torch.float64)
    got = out.double()
    assert torch.equal(got.isnan(), true.isnan())
    # past BF16's largest number the product is infinite
    exact = (true.abs() >= SMALLEST_NORMAL) | (true == 0)
    rounded = true.float().bfloat16().double()
    assert torch.equal(got[exact], rounded[exact])
    # subnormals of BF16 are multiples of 2^-133; the cut-off loses less than one
    small = ~exact & ~true.isnan()
    assert ((got - true)[small].abs() < 2.0**-133).all()
