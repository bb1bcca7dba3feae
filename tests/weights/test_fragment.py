"""Fragment order: what wgmma's register operand asks for, nothing lost, and no second copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from epfuse import ExpertWeights, Target
from epfuse.config import WeightFormat
from epfuse.errors import ConfigError
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.weights import fragment
from epfuse.weights.fragment import LARGEST_SCALE, SCALE_SHIFT, pack, unpack
from epfuse.weights.panels import RowOrder
from tests.cases import moved

SIZES = [(128, 256), (192, 128), (96, 160), (80, 32), (64, 384)]


def random_mxfp8(local: int, rows: int, columns: int, seed: int = 0) -> MXFP8:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 127, (local, rows, columns), generator=g, dtype=torch.uint8)
    codes |= torch.randint(0, 2, codes.shape, generator=g, dtype=torch.uint8) * 128
    scales = torch.randint(0, LARGEST_SCALE + 1, (local, rows, columns // 32), generator=g, dtype=torch.uint8)
    return MXFP8(codes.view(torch.float8_e4m3fn), scales)


def clone(weights: MXFP8) -> MXFP8:
    return MXFP8(weights.values.clone(), weights.scales.clone())


@pytest.mark.parametrize("order", RowOrder)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_round_trip(rows: int, columns: int, order: RowOrder) -> None:
    weights = random_mxfp8(3, rows, columns)
    packed = pack(clone(weights), order)
    for expert in range(3):
        back = unpack(packed, expert)
        assert torch.equal(back.values.view(torch.uint8), weights.values[expert].view(torch.uint8))
        assert torch.equal(back.scales, weights.scales[expert])


def source_row(order: RowOrder, rows: int, packed: int) -> int:
    """Which row of the matrix a packed row is, from the order's definition."""
    if order is RowOrder.PLAIN:
        return packed
    block, inside = divmod(packed, 16)
    return block * 8 + inside % 8 + (rows // 2 if inside >= 8 else 0)


@pytest.mark.parametrize("order", RowOrder)
def test_a_threads_bytes_are_its_register_operand(order: RowOrder) -> None:
    """PTX ISA: in registers of A, thread 32w + 4g + t has rows 16w + g (+ 8) and k 2t, 2t + 1 (+ 8) of each 16."""
    rows, columns = 128, 256
    weights = random_mxfp8(1, rows, columns)
    codes = weights.values[0].view(torch.uint8)
    packed = pack(clone(weights), order).codes[0]
    for panel, step, thread in [(0, 0, 0), (1, 3, 77), (0, 7, 127), (1, 5, 34)]:
        warp, lane = divmod(thread, 32)
        g, t = divmod(lane, 4)
        held = packed[panel, step, thread * 16 : thread * 16 + 16].tolist()
        for word in range(4):  # 16 k and half of it
            k = step * 32 + (word // 2) * 16 + (word % 2) * 8 + 2 * t
            bits = int.from_bytes(bytes(held[word * 4 : word * 4 + 4]), "little")
            # what the kernel's masks and shifts make of a word, as BF16 bits
            first, second = bits & 0x87F087F0, ((bits << 4) & 0x80F080F0) | ((bits >> 4) & 0x07000700)
            for half, pair in enumerate([first, second]):
                row = source_row(order, rows, panel * 64 + warp * 16 + g + 8 * half)
                for odd in range(2):
                    code = int(codes[row, k + odd])
                    assert (pair >> (16 * odd)) & 0xFFFF == (code & 0x80) << 8 | (code & 0x7F) << 4


def test_the_kernels_bit_operations_are_exact() -> None:
    """A code in a BF16's low exponent bits, times the stored scale byte as a BF16 exponent, is the value."""
    codes = torch.arange(256, dtype=torch.int32)
    codes = codes[(codes & 0x7F) != 0x7F]
    shifted = ((codes << 8) & 0x8000) | ((codes << 4) & 0x07F0)
    value = shifted.to(torch.uint16).view(torch.bfloat16)
    for scale in range(3, LARGEST_SCALE + 1):  # below 3 the products are BF16 subnormals that lose bits in any path
        factor = torch.tensor([(scale + SCALE_SHIFT) << 7], dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
        want = codes.to(torch.uint8).view(torch.float8_e4m3fn).double() * 2.0 ** (scale - 127)
        assert torch.equal((value * factor).double(), want)


def test_packing_takes_no_new_memory_for_whole_tiles() -> None:
    weights = random_mxfp8(2, 128, 256)
    codes, scales, nbytes = weights.values.data_ptr(), weights.scales.data_ptr(), weights.nbytes
    packed = pack(weights, RowOrder.GATE_UP)
    assert packed.codes.data_ptr() == codes
    assert packed.scales.data_ptr() == scales
    assert packed.nbytes == nbytes


@pytest.mark.parametrize(("codes_from", "scales_from"), [(8, 0), (0, 1), (0, 8), (1, 1)])
def test_memory_that_begins_between_the_kernels_copies_is_left_alone(codes_from: int, scales_from: int) -> None:
    """A tensor of a file that was read as one begins anywhere."""
    weights = random_mxfp8(2, 128, 256)
    codes, scales = moved(weights.values, codes_from), moved(weights.scales, scales_from)
    packed = pack(MXFP8(codes, scales), RowOrder.PLAIN)
    assert not any(tensor.data_ptr() % 16 for tensor in packed.tensors())
    assert torch.equal(codes.view(torch.uint8), weights.values.view(torch.uint8))
    assert torch.equal(scales, weights.scales)
    for expert in range(2):
        assert torch.equal(unpack(packed, expert).scales, scales[expert])


def test_what_has_no_code_is_refused_before_anything_is_written() -> None:
    for spoil, words in (
        (lambda w: w.scales[1].fill_(LARGEST_SCALE + 1), f"expert 1 has scale byte {LARGEST_SCALE + 1}"),
        (lambda w: w.values.view(torch.uint8)[2, 5, 7].fill_(0xFF), "expert 2 holds NaN codes"),
    ):
        weights = random_mxfp8(3, 64, 128)
        spoil(weights)
        before = weights.values.view(torch.uint8).clone()
        with pytest.raises(ConfigError, match=words):
            pack(weights, RowOrder.PLAIN)
        assert torch.equal(weights.values.view(torch.uint8), before)


def test_prepare_rearranges_for_hopper_only() -> None:
    w13, w2 = random_mxfp8(2, 128, 128), random_mxfp8(2, 128, 64)
    weights = ExpertWeights.mxfp8(w13.values, w13.scales, w2.values, w2.scales)
    assert weights.prepare(Target.CPU) is weights
    before = weights.kept[WeightFormat.MXFP8].w2.dequantize(torch.float32)
    prepared = weights.prepare(Target.SM90)
    assert set(prepared.kept) == {WeightFormat.FRAGMENT}
    fragments = prepared.kept[WeightFormat.FRAGMENT].w2
    assert torch.equal(unpack(fragments, 1).dequantize(torch.float32), before[1])


def test_prepare_leaves_what_it_can_not_hold(caplog: pytest.LogCaptureFixture) -> None:
    w13, w2 = random_mxfp8(2, 128, 128), random_mxfp8(2, 128, 64)
    w2.scales[1, 0, 0] = 254
    weights = ExpertWeights.mxfp8(w13.values, w13.scales, w2.values, w2.scales)
    assert weights.prepare(Target.SM90) is weights
    assert "expert 1 has scale byte 254" in caplog.text


class CountingSyncs(TorchDispatchMode):
    """Counts what makes the host wait for the device: a number of a tensor, and a mask as an index."""

    syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) else ()
        self.syncs += func is torch.ops.aten._local_scalar_dense.default
        self.syncs += any(index is not None and index.dtype is torch.bool for index in indices)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_the_host_does_not_wait_for_each_expert(rows: int, columns: int) -> None:
    """A model has thousands: what is refused is asked for once a stack, by `tolist`, which is no operator."""
    with CountingSyncs() as counting:
        pack(random_mxfp8(5, rows, columns), RowOrder.GATE_UP)
    assert counting.syncs == 0


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_groups_of_experts_change_nothing(rows: int, columns: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_mxfp8(5, rows, columns)
    whole = pack(clone(weights), RowOrder.GATE_UP)
    monkeypatch.setattr(fragment, "GROUP_BYTES", count * rows * -(-columns // 128) * 128 + 1)
    cut = pack(clone(weights), RowOrder.GATE_UP)
    assert torch.equal(cut.codes, whole.codes)
    assert torch.equal(cut.scales, whole.scales)
    weights.values.view(torch.uint8)[4, 0, 0] = 0x7F
    with pytest.raises(ConfigError, match="expert 4 holds NaN"):
        pack(weights, RowOrder.GATE_UP)
