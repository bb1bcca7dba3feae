"""128x128 block FP8 against a plain loop over blocks, and its error against the MXFP8 weights it is made from."""

from __future__ import annotations

import math

import pytest
import torch

from epfuse.errors import DeviceError, DtypeError, LayoutError, ShapeError
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.weights.block_fp8 import BlockFP8, BlockScale
from tests.cases import snr_db
from tests.numerics.formats import same

TINY = torch.finfo(torch.float32).tiny


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def expected(dense: torch.Tensor, rule: BlockScale) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers (float64) and scales of one [N, K] matrix, block by block, scales from exact logarithms."""
    out = torch.empty(dense.shape, dtype=torch.float64)
    scales = torch.empty(-(-dense.shape[0] // 128), -(-dense.shape[1] // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            amax = dense[at].abs().max()
            if rule is BlockScale.AMAX:
                scale = amax / 448
            else:
                mantissa, exponent = math.frexp(float(amax))
                scale = torch.tensor(2.0 ** (exponent - 9 + (mantissa > 0.875)) if amax > 0 else 0.0)
            scales[i, j] = scale.clamp(min=TINY)
            codes = (dense[at] / scales[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
            out[at] = codes.double() * scales[i, j].double()
    return out, scales


@pytest.mark.parametrize("rule", list(BlockScale))
@pytest.mark.parametrize("shape", [(2, 128, 256), (3, 130, 96), (1, 1, 32), (2, 300, 416)])
def test_quantize_is_the_plain_loop(rule: BlockScale, shape: tuple[int, ...], device: torch.device) -> None:
    dense = gaussian(*shape) * torch.logspace(-3, 3, shape[-1])
    dense[0] = 0
    dense[-1] *= 100
    weight = MXFP8.quantize(dense)
    block = BlockFP8.quantize(MXFP8(weight.values.to(device), weight.scales.to(device)), rule)
    assert block.shape == shape
    assert block.device.type == device.type
    for expert in range(shape[0]):
        numbers, scales = expected(weight[expert].dequantize(torch.float32), rule)
        assert torch.equal(block.scales[expert].cpu(), scales)
        assert same(block.dequantize(torch.float64)[expert], numbers)
    assert torch.equal(block.dequantize(torch.bfloat16), block.dequantize(torch.float32).to(torch.bfloat16))


@pytest.mark.parametrize("rule", list(BlockScale))
@pytest.mark.parametrize("amax", [447.0, 448.0, 449.0, 511.0, 512.0])
def test_the_largest_value_of_a_dense_weight_does_not_saturate(rule: BlockScale, amax: float) -> None:
    dense = torch.linspace(-1, 1, 128 * 128).view(1, 128, 128) * amax
    block = BlockFP8.quantize(dense, rule)
    numbers, scales = expected(dense[0], rule)
    assert torch.equal(block.scales[0], scales)
    assert same(block.dequantize(torch.float64)[0], numbers)
    assert scales.item() == pytest.approx(amax / 448 if rule is BlockScale.AMAX else 1 + (amax > 448), rel=1e-7)


def test_kind_of_source_does_not_matter() -> None:
    weight = MXFP8.quantize(gaussian(2, 256, 160))
    blocks = [
        BlockFP8.quantize(weight),
        BlockFP8.quantize(weight.dequantize(torch.bfloat16)),
        BlockFP8.quantize(weight.dequantize(torch.float32).transpose(1, 2).contiguous().transpose(1, 2)),
        BlockFP8.quantize(weight.to_fnuz_()),
    ]
    for other in blocks[1:]:
        assert torch.equal(other.scales, blocks[0].scales)
        assert torch.equal(other.dequantize(torch.float32), blocks[0].dequantize(torch.float32))


def test_error_against_mxfp8_on_gaussian_weights() -> None:
    weight = MXFP8.quantize(gaussian(2, 512, 512))
    oracle = weight.dequantize(torch.float64)
    power = snr_db(BlockFP8.quantize(weight, BlockScale.POWER_OF_TWO).dequantize(torch.float64), oracle)
    amax = snr_db(BlockFP8.quantize(weight, BlockScale.AMAX).dequantize(torch.float64), oracle)
    print(f"block FP8 against MXFP8: power of two {power:.1f} dB, amax {amax:.1f} dB")
    assert power > 80
    assert 30 < amax < 34


def test_a_power_of_two_keeps_every_value_whose_block_scales_are_close() -> None:
    # codes that stay E4M3 normals under the largest scale of the 128x128 block
    g = torch.Generator().manual_seed(2)
    values = torch.randint(0x30, 0x7F, (1, 128, 128), generator=g).to(torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.randint(120, 124, (1, 128, 4), generator=g).to(torch.uint8)
    weight = MXFP8(values, scales)
    assert torch.equal(BlockFP8.quantize(weight).dequantize(torch.float64), weight.dequantize(torch.float64))


@pytest.mark.parametrize("rule", list(BlockScale))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_block_with_a_non_finite_value_is_nan_and_its_neighbours_are_not(rule: BlockScale, value: float) -> None:
    dense = gaussian(1, 256, 256)
    dense[0, 200, 3] = value
    broken = torch.zeros(256, 256, dtype=torch.bool)
    broken[128:, :128] = True
    block = BlockFP8.quantize(dense, rule)
    assert torch.equal(block.dequantize(torch.float32)[0].isnan(), broken)
    assert torch.equal(block.values[0].float().isnan(), broken)


@pytest.mark.parametrize("rule", list(BlockScale))
def test_zeros_and_numbers_below_any_normal_scale(rule: BlockScale) -> None:
    dense = torch.zeros(1, 256, 128)
    dense[0, 128:] = TINY * torch.linspace(-3, 3, 128)
    block = BlockFP8.quantize(dense, rule)
    assert (block.scales == TINY).all()
    numbers = block.dequantize(torch.float64)
    assert (numbers[0, :128] == 0).all()
    assert (numbers - dense.double()).abs().max() <= TINY / 8


def test_fnuz_holds_the_same_numbers() -> None:
    block = BlockFP8.quantize(gaussian(2, 130, 96))
    assert torch.equal(block.matrix(1, torch.float64), block.dequantize(torch.float64)[1])
    numbers, pointer = block.dequantize(torch.float64), block.values.data_ptr()
    in_place = block.to_fnuz_()
    assert in_place.values.data_ptr() == pointer
    assert in_place.values.dtype == torch.float8_e4m3fnuz
    assert torch.equal(in_place.dequantize(torch.float64), numbers)
    assert in_place.nbytes == 2 * 130 * 96 + 2 * 2 * 1 * 4


def test_what_is_refused() -> None:
    block = BlockFP8.quantize(gaussian(2, 256, 256))
    values, scales = block.values, block.scales
    with pytest.raises(ShapeError, match=r"weight has shape \(4, 64\)"):
        BlockFP8.quantize(gaussian(4, 64))
    with pytest.raises(DtypeError, match=r"weight has dtype torch\.float64"):
        BlockFP8.quantize(gaussian(1, 4, 64).double())
    with pytest.raises(ShapeError, match=r"values has shape \(256, 256\)"):
        BlockFP8(values[0], scales[0])
    with pytest.raises(DtypeError, match=r"values has dtype torch\.uint8"):
        BlockFP8(values.view(torch.uint8), scales)
    with pytest.raises(DtypeError, match=r"scales has dtype torch\.float64"):
        BlockFP8(values, scales.double())
    with pytest.raises(ShapeError, match=r"scales has shape \(2, 2, 1\).*\(2, 2, 2\)"):
        BlockFP8(values, scales[..., :1].contiguous())
    with pytest.raises(DeviceError, match="scales is on meta"):
        BlockFP8(values, scales.to("meta"))
    with pytest.raises(LayoutError, match="values has strides"):
        BlockFP8(values.transpose(1, 2), scales)
    with pytest.raises(LayoutError, match="scales has strides"):
        BlockFP8(values, scales.transpose(1, 2))
    with pytest.raises(DtypeError, match=r"dtype is torch\.float16"):
        block.dequantize(torch.float16)
