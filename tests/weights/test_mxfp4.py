"""MXFP4 to MXFP8 against the numbers that the MX specification lists, and against transformers' own reader."""

from __future__ import annotations

import math

import pytest
import torch

from epfuse.errors import ConfigError, DtypeError, EpfuseError, ShapeError
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.weights.mxfp4 import to_mxfp8

E2M1 = [sign * number for sign in (1.0, -1.0) for number in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
"""By code: OCP Microscaling Formats (MX) v1.0, table 5."""


def packed(codes: torch.Tensor) -> torch.Tensor:
    """[.., K] codes -> [.., K / 32, 16] bytes."""
    low, high = codes.unflatten(-1, (-1, 16, 2)).unbind(-1)
    return low | high << 4


def test_every_code_under_every_scale_keeps_its_bits(device: torch.device) -> None:
    scales = torch.arange(256).to(torch.uint8).repeat_interleave(16).view(256, 16)
    codes = torch.arange(256)[:, None].expand(-1, 512).clone()
    codes = (torch.arange(512) // 32 + torch.arange(512) + codes).remainder(16).to(torch.uint8)
    found = to_mxfp8(packed(codes).to(device), scales.to(device))
    assert found.values.dtype == torch.float8_e4m3fn
    assert torch.equal(found.scales.cpu(), scales)
    numbers = found.dequantize(torch.float64).cpu()
    powers = torch.tensor([math.ldexp(1.0, scale - 127) for scale in range(256)], dtype=torch.float64)
    wanted = torch.tensor(E2M1, dtype=torch.float64)[codes.long()] * powers[:, None]
    assert torch.equal(numbers[:255].view(torch.int64), wanted[:255].view(torch.int64))  # bits tell -0 from 0
    assert bool(numbers[255].isnan().all())


def test_a_stack_is_what_transformers_reads() -> None:
    reader = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    torch.manual_seed(0)
    blocks = torch.randint(256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(90, 160, (3, 10, 2), dtype=torch.uint8)
    own = reader(blocks, scales, dtype=torch.float32).transpose(1, 2)  # theirs is [E, K, N]
    found = to_mxfp8(blocks, scales.view(torch.float8_e8m0fnu))
    assert isinstance(found, MXFP8)
    assert found.shape == (3, 10, 64)
    assert torch.equal(found.dequantize(torch.float32), own)


def test_nothing_is_shared_with_the_source_and_views_are_taken() -> None:
    blocks, scales = torch.full((4, 6, 1, 16), 0x42, dtype=torch.uint8), torch.full((4, 6, 1), 127, dtype=torch.uint8)
    found = to_mxfp8(blocks[::2], scales[::2])
    blocks.zero_()
    scales.zero_()
    assert torch.equal(found.dequantize(torch.float32), torch.tensor([1.0, 2.0]).repeat(16).expand(2, 6, 32))


@pytest.mark.parametrize(
    ("blocks", "scales", "error"),
    [
        (torch.zeros(2, 4, 1, 16), torch.zeros(2, 4, 1, dtype=torch.uint8), DtypeError),
        (torch.zeros(2, 4, 16, dtype=torch.uint8), torch.zeros(2, 4, 1, dtype=torch.uint8), ShapeError),
        (torch.zeros(2, 4, 1, 8, dtype=torch.uint8), torch.zeros(2, 4, 1, dtype=torch.uint8), ShapeError),
        (torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8), ShapeError),
        (torch.zeros(2, 4, 1, 16, dtype=torch.uint8), torch.zeros(2, 4, 1), DtypeError),
        ([0], torch.zeros(2, 4, 1, dtype=torch.uint8), ConfigError),
    ],
)
def test_what_is_no_mxfp4_is_refused(blocks: object, scales: torch.Tensor, error: type[EpfuseError]) -> None:
    with pytest.raises(error, match=r"blocks|scales"):
        to_mxfp8(blocks, scales)  # type: ignore[arg-type]
