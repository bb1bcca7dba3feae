"""Hopper's BF16 products of FP8 weights with one scale a row, against float64: on a GPU, and in numpy off it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from epfuse import SwiGLUOAI
from epfuse.stages import sm90_codes, sm90_gemm, sm90_layouts
from epfuse.stages.down import reference as down_reference
from epfuse.stages.gate_up import reference as gate_up_reference
from epfuse.stages.tiles import Sm90Tile
from epfuse.weights.panels import RowOrder
from epfuse.weights.row_fp8 import pack_rows
from tests.cases import ROUTINGS
from tests.stages.plain_gluon import numbers, plain
from tests.stages.plain_memory import UINT8, Pointers
from tests.stages.plain_ptx import assembly_of, run_ptx
from tests.stages.plain_tiles import TOKENS, PlainTile
from tests.stages.plain_tiles import TOP_K as FEW_K
from tests.stages.test_gemms import SNR_FLOOR, check_rows
from tests.stages.test_sm90 import LOCAL, TOP_K, clone, launch, poisoned, random_mxfp8, table_and_rows, tiny_and_large

ACTIVATION = SwiGLUOAI()
TILES = {
    "8x64": (8, Sm90Tile(64, 128, 0, 4, 4)),
    "8x64_split": (8, Sm90Tile(64, 128, 0, 4, 3, split_k=8)),
    "8x128_guess": (8, Sm90Tile(128, 128, 0, 4, 4, guess_bytes=512)),
    "16x128_8warps": (16, Sm90Tile(128, 128, 0, 8, 4)),
    "32x128": (32, Sm90Tile(128, 128, 0, 4, 3)),
    "64x128_grouped": (64, Sm90Tile(128, 128, 4, 8, 3)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate"), [(37, 256, 384), (300, 512, 256), (1, 256, 256), (20, 288, 160), (20, 96, 96)]
)
def test_both_gemms(device, tokens, hidden, intermediate, routing, name):
    """On the numbers that the packed weights stand for."""
    block_m, tile = TILES[name]
    routes, rows = table_and_rows(device, routing, tokens, block_m, tile, hidden, intermediate)
    g = torch.Generator().manual_seed(tokens)
    x = (torch.randn(tokens, hidden, generator=g) * torch.rand(tokens, 1, generator=g) * 8).to(device, torch.bfloat16)
    topk_weights = torch.rand(tokens, TOP_K, generator=g).to(device)

    packed = pack_rows(clone(random_mxfp8(device, 2 * intermediate, hidden, 1)), RowOrder.GATE_UP)
    y = poisoned(tokens * TOP_K, intermediate, device)
    launch(y, "gate_up", x, packed, routes, tile)
    want = gate_up_reference.gate_up(x, packed, routes, TOP_K, ACTIVATION, torch.float64)
    check_rows(y, want, rows, SNR_FLOOR[torch.bfloat16])

    packed = pack_rows(clone(random_mxfp8(device, hidden, intermediate, 2)), RowOrder.PLAIN)
    out = poisoned(tokens * TOP_K, hidden, device)
    launch(out, "down", y, packed, routes, tile, topk_weights)
    want = down_reference.down(y.double(), packed, routes, topk_weights, torch.float64)
    check_rows(out, want, rows, SNR_FLOOR[torch.bfloat16])


@pytest.mark.gpu
def test_nan_tiny_and_large_numbers(device):
    """A NaN in a row of weights makes that row's results NaN and no others; sums neither overflow nor vanish early."""
    tokens, hidden, intermediate = 37, 256, 128
    block_m, tile = TILES["8x64"]
    routes, rows = table_and_rows(device, "uniform", tokens, block_m, tile, hidden, intermediate)
    y = tiny_and_large(device, tokens * TOP_K, intermediate)
    topk_weights = torch.ones(tokens, TOP_K, device=device)
    weights = random_mxfp8(device, hidden, intermediate, 2)
    clean = pack_rows(clone(weights), RowOrder.PLAIN)
    weights.values.view(torch.uint8)[:, 5, 70] = 0xFF
    packed = pack_rows(clone(weights), RowOrder.PLAIN)
    out = poisoned(tokens * TOP_K, hidden, device)
    launch(out, "down", y, packed, routes, tile, topk_weights)
    assert out[rows, 5].isnan().all()
    want = down_reference.down(y.double(), clean, routes, topk_weights, torch.float64)
    out[rows, 5] = want[rows, 5].to(out.dtype)
    check_rows(out, want, rows, SNR_FLOOR[torch.bfloat16])


@pytest.mark.parametrize("stage", ["gate_up", "down"])
@pytest.mark.parametrize(("split", "shares", "tail"), [(0, 1, False), (1, 2, False), (0, 1, True), (1, 2, True)])
@pytest.mark.parametrize("columns", [512, 288])
def test_a_tile_against_float64(columns: int, split: int, shares: int, tail: bool, stage: str) -> None:
    """The kernels' own code in numpy: padding rows of x, a panel past the expert's last, K cut short, every scale."""
    rows = 192 if stage == "down" else 2 * 96  # three panels: the second tile's last one is none
    packed = pack_rows(clone(random_mxfp8("cpu", rows, columns, 1)), RowOrder.PLAIN)
    x = torch.randn(TOKENS * FEW_K, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    tile = PlainTile(stage, LOCAL - 1, split, shares, tail)
    sizes = (rows, columns, packed.steps * 128, packed.panels)
    got = tile.run(x, Pointers.to_tensor(packed.codes.view(torch.uint8), UINT8), packed.scales, sizes, "codes_to_bf16")
    inside = tile.inside(packed.steps)
    want = packed.matrix(tile.expert, torch.float64)[128:, inside] @ x[tile.reads, inside].double().T
    torch.testing.assert_close(torch.from_numpy(got)[:64, :4], want, rtol=1e-12, atol=1e-12)
    assert not got[:, 4:].any()


def test_codes_and_numbers_of_x_meet() -> None:
    """At every k of wgmma lie a code and a number that have the same k, for each half of a stage and any panel."""
    block_n, k_padded, step = 128, 384, 1
    own, across = sm90_layouts.code_bits.fn()
    bits = [*own, *across]  # of an offset within a row's 64 codes
    with plain(sm90_gemm, sm90_layouts):
        at = sm90_gemm.fragment_pointers(numbers(step * 64 * 128), 3, 7, k_padded, block_n, 128, 2, True)
        pairs = sm90_gemm.k_of_pair(numbers(np.arange(64)))
    assert at.shape == (2, 2, 64 * 64)
    assert sorted(pairs) == list(range(64))
    memory = np.arange(8 * k_padded * 64).reshape(8, k_padded // 128, 64, 128)  # [panels, steps, rows, 128]
    for half in range(2):
        for panel in range(2):
            rows = at[half, panel].reshape(64, 64)
            assert np.array_equal(rows, memory[3 + panel, step, :, half * 64 : half * 64 + 64])
        for offset in range(64):
            k = half * 64 + sum(bit[1] for place, bit in enumerate(bits) if offset >> place & 1)
            assert pairs[k // 2] * 2 + k % 2 == half * 64 + offset
    with plain(sm90_gemm, sm90_layouts):  # past the last panel of the expert that one is read again
        last = sm90_gemm.fragment_pointers(numbers(0), 7, 7, k_padded, block_n, 128, 2, True)
    assert np.array_equal(last[:, 0], last[:, 1])


def test_every_code_is_its_number() -> None:
    """All 254 of them, at each of four places of a word."""
    text = assembly_of(sm90_codes.codes_to_bf16)
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    want = codes.view(torch.float8_e4m3fn).double() / 256
    for first in range(len(codes)):
        four = [(first + place * 85) % len(codes) for place in range(4)]
        assert torch.equal(run_ptx(text, [int(codes[index]) for index in four]).double(), want[four])
