"""The quantise kernel is bit for bit the PyTorch encoding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epfuse.errors import DeviceError, DtypeError, EpfuseError, LayoutError, ShapeError
from epfuse.numerics.mxfp8 import ScaleRounding, encode
from epfuse.stages.quantize.launch import launch_quantize
from epfuse.stages.quantize.reference import quantize
from epfuse.stages.quantize.rows import FP8Rows
from tests.conftest import DEVICE
from tests.numerics.formats import corner_rows
from tests.stages.quantize.tile_kernel import tile_kernel

TARGETS = [torch.float8_e4m3fn, torch.float8_e4m3fnuz]
SOURCES = [torch.bfloat16, torch.float16, torch.float32]


def assert_same_bits(got: FP8Rows, expected: FP8Rows) -> None:
    assert got.values.dtype == expected.values.dtype
    assert torch.equal(got.values.view(torch.uint8).cpu(), expected.values.view(torch.uint8).cpu())
    assert torch.equal(got.scales.cpu(), expected.scales.cpu())


def poisoned(tokens: int, size: int, dtype: torch.dtype, device: torch.device, group: int = 32) -> FP8Rows:
    """An output in which a byte that is not written shows."""
    return FP8Rows(
        torch.full((tokens, size), 0x55, dtype=torch.uint8, device=device).view(dtype),
        torch.full((tokens, -(-size // group)), 0x55, dtype=torch.uint8, device=device),
        group,
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_corner_cases(target: torch.dtype, source: torch.dtype, device: torch.device) -> None:
    x = corner_rows(source).to(device)
    assert_same_bits(launch_quantize(x, 32, dtype=target), quantize(x.cpu(), 32, dtype=target))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of signalling NaNs
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_beside_every_exponent(
    target: torch.dtype, source: torch.dtype, device: torch.device
) -> None:
    # all 2^16 bit patterns, in an order that gives a block close magnitudes (sorted) or far ones (shuffled)
    ordered = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(source)
    shuffled = ordered[torch.randperm(65536, generator=torch.Generator().manual_seed(3))]
    x = torch.cat([ordered, shuffled]).view(64, 2048).to(device)
    assert_same_bits(launch_quantize(x, 32, dtype=target), quantize(x.cpu(), 32, dtype=target))


def test_every_rounding_boundary_of_e4m3(device: torch.device) -> None:
    # midpoints between neighbouring E4M3 numbers and the float32 numbers next to them; 448 (256) keeps the scale at 1
    magnitudes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    near = torch.cat([middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(1e9)), magnitudes])
    values = torch.cat([near, -near])
    x = torch.full((-(-values.numel() // 31), 32), 448.0)
    x[:, 1:] = torch.nn.functional.pad(values, (0, -values.numel() % 31)).view(-1, 31)
    got = launch_quantize(x.to(device), 32)
    assert (got.scales == 127).all()
    assert_same_bits(got, quantize(x, 32))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=32, max_size=32),
    st.sampled_from(TARGETS),
)
def test_any_block(block: list[float], target: torch.dtype) -> None:
    x = torch.tensor([block])
    assert_same_bits(launch_quantize(x.to(DEVICE), 32, dtype=target), quantize(x, 32, dtype=target))


@pytest.mark.parametrize("tokens", [0, 1, 3, 37])
@pytest.mark.parametrize("size", [32, 96, 1024, 1184])
@pytest.mark.parametrize("group", [32, 128])
def test_shapes_and_strides_and_that_every_byte_is_written(
    tokens: int, size: int, group: int, device: torch.device
) -> None:
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, size + 17, generator=g).to(torch.bfloat16).to(device)[:, 8 : size + 8]
    out = poisoned(tokens, size, torch.float8_e4m3fn, device, group)
    assert launch_quantize(x, group, out=out) is out
    assert_same_bits(out, quantize(x.cpu(), group))


def test_the_reference_in_groups_of_32_is_mxfp8() -> None:
    x = corner_rows(torch.bfloat16)
    values, scales = encode(x, ScaleRounding.CEIL)
    assert_same_bits(quantize(x, 32), FP8Rows(values, scales, 32))


@pytest.mark.parametrize("target", TARGETS)
def test_quantize_block_in_a_tile_of_three_dimensions(target: torch.dtype, device: torch.device) -> None:
    x = corner_rows(torch.bfloat16, columns=128)[:16].to(device)
    out = poisoned(16, 128, target, device)
    fnuz = target == torch.float8_e4m3fnuz
    tile_kernel[(1,)](x, out.values.view(torch.uint8), out.scales, ROWS=16, GROUPS=4, FNUZ=fnuz)
    assert_same_bits(out, quantize(x.cpu(), 32, dtype=target))


def test_reference_in_fnuz_holds_the_same_numbers() -> None:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    fn, fnuz = quantize(x), quantize(x, dtype=torch.float8_e4m3fnuz)
    assert torch.equal(fn.dequantize(torch.float64), fnuz.dequantize(torch.float64))
    with pytest.raises(DtypeError, match=r"dtype is torch\.float8_e5m2"):
        quantize(x, dtype=torch.float8_e5m2)


def test_what_is_refused(device: torch.device) -> None:
    x = torch.zeros(4, 64, dtype=torch.bfloat16, device=device)
    out = poisoned(4, 64, torch.float8_e4m3fn, device)
    elsewhere = FP8Rows(out.values.to("meta"), out.scales.to("meta"), 32)
    cases: list[tuple[type[EpfuseError], str, torch.Tensor, dict[str, object]]] = [
        (ShapeError, r"x has shape \(4, 33\)", x[:, :33], {}),
        (ShapeError, r"x has shape \(1, 4, 64\)", x[None], {}),
        (DtypeError, "x has dtype torch.float64", x.double(), {}),
        (DtypeError, "dtype is torch.float8_e5m2", x, {"dtype": torch.float8_e5m2}),
        (LayoutError, "x has strides", torch.zeros(64, 64, device=device).t(), {}),
        (ShapeError, r"out has shape \(4, 64\)", x[:3], {"out": out}),
        (DtypeError, "out has dtype", x, {"out": out, "dtype": torch.float8_e4m3fnuz}),
        (DeviceError, "out is on meta", x, {"out": elsewhere}),
        (ShapeError, "out has shape .* in groups of 32; .* groups of 128", x, {"out": out, "group": 128}),
    ]
    for error, message, tensor, arguments in cases:
        with pytest.raises(error, match=message):
            launch_quantize(tensor, **arguments)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_graph_capture(device: torch.device) -> None:
    x = torch.randn(37, 6144, device=device).to(torch.bfloat16)
    out = launch_quantize(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_quantize(x, out=out)
    x.copy_(torch.randn(37, 6144, device=device))
    graph.replay()
    assert_same_bits(out, quantize(x.cpu()))


def test_fp8_rows_that_do_not_fit_together_are_refused() -> None:
    values, scales = torch.zeros(4, 96).to(torch.float8_e4m3fn), torch.zeros(4, 3, dtype=torch.uint8)
    cases: list[tuple[type[EpfuseError], str, tuple[object, ...]]] = [
        (ShapeError, r"scales has shape \(4, 3\).* groups of 128 it must be \(4, 1\)", (values, scales, 128)),
        (ShapeError, r"values has shape \(1, 4, 96\)", (values[None], scales, 32)),
        (DtypeError, "values has dtype torch.uint8", (values.view(torch.uint8), scales, 32)),
        (DtypeError, "scales has dtype torch.int8", (values, scales.to(torch.int8), 32)),
        (DeviceError, "scales is on meta", (values, scales.to("meta"), 32)),
        (LayoutError, "values has strides", (torch.zeros(96, 4).to(torch.float8_e4m3fn).t(), scales, 32)),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            FP8Rows(*arguments)  # type: ignore[arg-type]
