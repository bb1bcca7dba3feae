"""The MXFP8 type: what it holds, converts and refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from epfuse.errors import DeviceError, DtypeError, LayoutError, ShapeError
from epfuse.numerics.mxfp8 import MXFP8, ScaleRounding, decode, encode
from tests.numerics.formats import same


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 64), (3, 5, 64), (2, 3, 5, 32), (0, 5, 64), (3, 0, 64)])
@pytest.mark.parametrize("rounding", list(ScaleRounding))
def test_quantize_and_dequantize_a_stack_as_one_call_would(
    shape: tuple[int, ...], rounding: ScaleRounding, device: torch.device
) -> None:
    x = (some(*shape) * 100).to(device)
    quantized = MXFP8.quantize(x, rounding)
    values, scales = encode(x, rounding)
    assert torch.equal(quantized.values.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(quantized.scales, scales)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert same(quantized.dequantize(dtype), decode(values, scales, dtype))


def test_properties() -> None:
    quantized = MXFP8.quantize(some(3, 5, 64))
    assert quantized.shape == (3, 5, 64)
    assert quantized.device == torch.device("cpu")
    assert quantized.nbytes == 3 * 5 * 64 + 3 * 5 * 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantized.values = quantized.scales  # type: ignore[misc]


def test_indexing_a_stack_gives_a_view_of_one_matrix() -> None:
    stack = MXFP8.quantize(some(3, 5, 64))
    one = stack[1]
    assert one.values.data_ptr() == stack.values[1].data_ptr()
    assert same(one.dequantize(torch.float32), stack.dequantize(torch.float32)[1])
    assert len(list(stack)) == 3
    with pytest.raises(ShapeError, match="stack"):
        one[0]


def test_fnuz_holds_the_same_numbers_in_the_same_memory() -> None:
    quantized = MXFP8.quantize(some(3, 5, 64))
    numbers, pointer = quantized.dequantize(torch.float64), quantized.values.data_ptr()
    fnuz = quantized.to_fnuz_()
    assert (fnuz.values.dtype, fnuz.values.data_ptr()) == (torch.float8_e4m3fnuz, pointer)
    assert torch.equal(fnuz.dequantize(torch.float64), numbers)
    with pytest.raises(DtypeError, match="starts from float8_e4m3fn"):
        fnuz.to_fnuz_()


def test_scales_may_come_as_torch_e8m0() -> None:
    quantized = MXFP8.quantize(some(5, 64))
    typed = MXFP8(quantized.values, quantized.scales.view(torch.float8_e8m0fnu))
    assert typed.scales.dtype == torch.uint8
    assert typed.scales.data_ptr() == quantized.scales.data_ptr()


def test_dequantize_needs_no_temporary_of_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = MXFP8.quantize(some(6, 8, 64))
    largest = 0
    plain = torch.Tensor.to

    def watched(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, self.numel())
        return plain(self, *args, **kwargs)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch.Tensor, "to", watched)
    quantized.dequantize(torch.bfloat16)
    assert largest == 8 * 64


def test_what_is_refused() -> None:
    good = MXFP8.quantize(some(4, 64))
    values, scales = good.values, good.scales
    with pytest.raises(ShapeError, match=r"values has shape \(64,\)"):
        MXFP8(values[0], scales[0])
    with pytest.raises(ShapeError, match=r"values has shape \(4, 48\).*multiple of 32"):
        MXFP8(values[:, :48].contiguous(), scales)
    with pytest.raises(ShapeError, match=r"scales has shape \(4, 1\).*must be \(4, 2\)"):
        MXFP8(values, scales[:, :1].contiguous())
    with pytest.raises(DtypeError, match=r"values has dtype torch\.uint8"):
        MXFP8(values.view(torch.uint8), scales)
    with pytest.raises(DtypeError, match=r"scales has dtype torch\.float32"):
        MXFP8(values, scales.float())
    with pytest.raises(DeviceError, match="scales is on meta"):
        MXFP8(values, scales.to("meta"))
    with pytest.raises(LayoutError, match=r"values has strides \(1, 64\)"):
        MXFP8(torch.empty(64, 64, dtype=torch.float8_e4m3fn).t(), torch.zeros(64, 2, dtype=torch.uint8))
    with pytest.raises(LayoutError, match="scales has strides"):
        MXFP8(values, torch.zeros(2, 4, dtype=torch.uint8).t())
    with pytest.raises(DtypeError, match=r"dtype is torch\.float16"):
        good.dequantize(torch.float16)
    with pytest.raises(ShapeError, match=r"x has shape \(64,\)"):
        MXFP8.quantize(some(64))
    with pytest.raises(DtypeError, match="x has dtype"):
        MXFP8.quantize(some(4, 64).double())
    with pytest.raises(DtypeError, match="x has dtype"):
        MXFP8.quantize(some(0, 64).double())
