"""One scale a row: MXFP8's numbers where E4M3 can hold them, and close to them elsewhere; in their own memory."""

from __future__ import annotations

import pytest
import torch

from epfuse import ExpertWeights, Path, Target
from epfuse.config import WeightFormat
from epfuse.errors import ConfigError
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.weights.panels import RowOrder, source_rows
from epfuse.weights.row_fp8 import one_scale_a_row, pack_rows
from tests.cases import moved

SIZES = [(128, 256), (192, 128), (96, 160), (80, 32), (64, 384)]


def random_mxfp8(local: int, rows: int, columns: int, low: int = 118, high: int = 122) -> MXFP8:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 127, (local, rows, columns), generator=g, dtype=torch.uint8)
    codes |= torch.randint(0, 2, codes.shape, generator=g, dtype=torch.uint8) * 128
    scales = torch.randint(low, high + 1, (local, rows, columns // 32), generator=g, dtype=torch.uint8)
    return MXFP8(codes.view(torch.float8_e4m3fn), scales)


def clone(weights: MXFP8) -> MXFP8:
    return MXFP8(weights.values.clone(), weights.scales.clone())


def by_hand(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float64 ``[N, K]`` of MXFP8, by another way than the code's: one value at a time."""
    codes = values.view(torch.uint8)
    out = torch.empty(codes.shape, dtype=torch.float64)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            code, scale = int(codes[row, column]), int(scales[row, column // 32])
            exponent, mantissa = code >> 3 & 15, code & 7
            size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
            out[row, column] = (-size if code & 128 else size) * 2.0 ** (scale - 127)
    return out


@pytest.mark.parametrize("order", RowOrder)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_matrix_undoes_the_packing(rows: int, columns: int, order: RowOrder) -> None:
    weights = random_mxfp8(3, rows, columns)
    packed = pack_rows(clone(weights), order)
    for expert in range(3):
        values, scales = one_scale_a_row(weights.values[expert], weights.scales[expert])
        want = values.double() * scales.double()[:, None]
        torch.testing.assert_close(packed.matrix(expert, torch.float64), want, rtol=0, atol=0)
        torch.testing.assert_close(packed.matrix(expert, torch.float32).double(), want, rtol=0, atol=0)


def test_a_panel_is_steps_of_128_k_of_64_rows() -> None:
    weights = random_mxfp8(2, 128, 256)
    packed = pack_rows(clone(weights), RowOrder.GATE_UP)
    assert packed.codes.shape == (2, 2, 2, 64, 128)
    source = source_rows(128, RowOrder.GATE_UP)
    values, _ = one_scale_a_row(weights.values[1], weights.scales[1])
    for panel, step, row in ((0, 1, 3), (1, 0, 63)):
        got = packed.codes[1, panel, step, row].view(torch.uint8)
        want = values[source[panel * 64 + row], step * 128 : step * 128 + 128].view(torch.uint8)
        assert torch.equal(got, want)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_the_longest_rows_of_gate_and_up_are_known(rows: int, columns: int) -> None:
    weights = random_mxfp8(3, rows, columns)
    weights.scales[1, rows // 2 + 2] = 140  # an up row
    packed = pack_rows(clone(weights), RowOrder.GATE_UP)
    for expert in range(3):
        lengths = packed.matrix(expert, torch.float64).norm(dim=1)
        want = torch.stack([lengths[: rows // 2].amax(), lengths[rows // 2 :].amax()]).float()
        torch.testing.assert_close(packed.longest[expert], want, rtol=1e-5, atol=0)
    weights.values.view(torch.uint8)[2, 0, 5] = 0x7F
    nan = pack_rows(clone(weights), RowOrder.GATE_UP).longest.isnan()
    assert nan.tolist() == [[False, False], [False, False], [True, False]]


def test_large_values_are_exact_and_small_ones_are_close() -> None:
    weights = random_mxfp8(1, 24, 96, 100, 140)
    values, scales = one_scale_a_row(weights.values[0], weights.scales[0])
    got = values.double() * scales.double()[:, None]
    want = by_hand(weights.values[0], weights.scales[0])
    largest = want.abs().amax(1, keepdim=True)
    large = want.abs() >= largest * 2.0**-13
    assert 0 < large.sum() < large.numel()
    assert torch.equal(got[large], want[large])
    assert ((got - want).abs() <= largest * 2.0**-17).all()
    assert (values.double().abs().amax(1) > 224).all()  # no smaller scale would do


def test_normal_weights_lose_next_to_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    packed = MXFP8.quantize(torch.randn(256, 2048, generator=g) * 0.02)
    values, scales = one_scale_a_row(packed.values, packed.scales)
    want = packed.dequantize(torch.float64)
    lost = (values.double() * scales.double()[:, None] - want).norm() / want.norm()
    assert 0 < lost < 3e-7


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 254), (254, 254)])
def test_every_scale(low: int, high: int) -> None:
    weights = random_mxfp8(1, 64, 128, low, high)
    weights.values.view(torch.uint8)[0, 5] = 0
    weights.values.view(torch.uint8)[0, 6, 32:64] = 0x80
    weights.scales[0, 6, 1] = 254
    values, scales = one_scale_a_row(weights.values[0], weights.scales[0])
    got, want = values.double() * scales.double()[:, None], by_hand(weights.values[0], weights.scales[0])
    assert got.isfinite().all()
    # a row of nothing but the least scale has numbers below float32's normal ones: those may be lost
    least = 2.0**-126 * 2.0**-9
    assert ((got - want).abs() <= torch.maximum(want.abs().amax(1, keepdim=True) * 2.0**-17, torch.tensor(least))).all()


def test_nan_stays_where_it_is() -> None:
    weights = random_mxfp8(1, 64, 128)
    clean = one_scale_a_row(weights.values[0], weights.scales[0])
    weights.values.view(torch.uint8)[0, 3, 70] = 0x7F
    weights.scales[0, 4, 1] = 255
    values, scales = one_scale_a_row(weights.values[0], weights.scales[0])
    got = values.double() * scales.double()[:, None]
    want = torch.zeros(64, 128, dtype=torch.bool)
    want[3, 70] = want[4, 32:64] = True
    assert torch.equal(got.isnan(), want)
    others = [row for row in range(64) if row not in (3, 4)]
    assert torch.equal(values[others].view(torch.uint8), clean[0][others].view(torch.uint8))


def test_names_are_no_paths_or_targets() -> None:
    w13, w2 = random_mxfp8(2, 256, 256), random_mxfp8(2, 256, 128)
    before = w13.values.view(torch.uint8).clone()
    with pytest.raises(ConfigError, match=r"path is 'w8a8'; it must be an epfuse\.Path"):
        ExpertWeights.mxfp8(w13.values, w13.scales, w2.values, w2.scales).prepare(Target.SM90, "w8a8")
    with pytest.raises(ConfigError, match=r"target is 'sm_90'; it must be an epfuse\.Target"):
        ExpertWeights.mxfp8(w13.values, w13.scales, w2.values, w2.scales).prepare("sm_90", Path.W8A8)
    assert torch.equal(w13.values.view(torch.uint8), before)


def test_prepare_for_w8a8_takes_no_second_copy() -> None:
    w13, w2 = random_mxfp8(2, 256, 256), random_mxfp8(2, 256, 128)
    weights = ExpertWeights.mxfp8(w13.values, w13.scales, w2.values, w2.scales)
    before = weights.nbytes[WeightFormat.MXFP8]
    prepared = weights.prepare(Target.SM90, Path.W8A8)
    assert list(prepared.kept) == [WeightFormat.ROW_FP8]
    packed = prepared.kept[WeightFormat.ROW_FP8]
    assert packed.w13.codes.data_ptr() == w13.values.data_ptr()
    assert packed.w2.codes.data_ptr() == w2.values.data_ptr()
    assert prepared.nbytes[WeightFormat.ROW_FP8] < before
    w13, w2 = random_mxfp8(2, 256, 256), random_mxfp8(2, 256, 128)
    other = ExpertWeights.mxfp8(w13.values, w13.scales, w2.values, w2.scales)
    assert list(other.prepare(Target.GFX950, Path.W8A8).kept) == [WeightFormat.MXFP8]


def test_codes_that_begin_between_the_kernels_copies_are_left_alone() -> None:
    weights = random_mxfp8(2, 128, 256)
    codes = moved(weights.values, 8)
    packed = pack_rows(MXFP8(codes, weights.scales), RowOrder.PLAIN)
    assert packed.codes.data_ptr() % 16 == 0
    assert torch.equal(codes.view(torch.uint8), weights.values.view(torch.uint8))
    want = pack_rows(clone(weights), RowOrder.PLAIN)
    assert torch.equal(packed.codes.view(torch.uint8), want.codes.view(torch.uint8))
