"""Hopper's BF16 products of block FP8 weights, against float64: on a GPU, and in numpy off it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from epfuse import ExpertWeights, Path, SwiGLUOAI
from epfuse.config import WeightFormat
from epfuse.reference import run_reference
from epfuse.stages import sm90_codes, sm90_gemm, sm90_layouts
from epfuse.stages.down import reference as down_reference
from epfuse.stages.down.launch_sm90 import launch_down_sm90
from epfuse.stages.gate_up import reference as gate_up_reference
from epfuse.stages.gate_up.launch_sm90 import launch_gate_up_sm90
from epfuse.stages.tiles import LayerTiles, Sm90Tile
from epfuse.verify.suite import poisoned_memory, same_bits
from epfuse.weights.block_fp8 import BLOCK, BlockFP8, BlockFP8Experts
from tests.cases import ROUTINGS, make_case, run_in_tiles, snr_db
from tests.stages.plain_gluon import numbers, plain
from tests.stages.plain_memory import FLOAT8, Pointers
from tests.stages.plain_ptx import assembly_of, run_ptx
from tests.stages.plain_tiles import TOKENS, PlainTile
from tests.stages.plain_tiles import TOP_K as FEW_K
from tests.stages.test_gemms import SNR_FLOOR, check_rows
from tests.stages.test_sm90 import LOCAL, TOP_K, launch, poisoned, table_and_rows, tiny_and_large
from tests.stages.test_sm90_block_fp8 import random_block_fp8

ACTIVATION = SwiGLUOAI()
FLOOR = SNR_FLOOR[torch.bfloat16]
TILES = {
    "8x64": (8, Sm90Tile(64, 128, 0, 4, 3, tail_split=4)),
    "8x64_split": (8, Sm90Tile(64, 128, 0, 4, 3, split_k=4)),
    "8x128_guess": (8, Sm90Tile(128, 128, 0, 4, 4, guess_bytes=512)),
    "16x128_8warps": (16, Sm90Tile(128, 128, 0, 8, 4, split_k=2)),
    "64x128_grouped": (64, Sm90Tile(128, 128, 4, 8, 3)),
}
CALLS = [
    (37, 256, 384, False),
    (300, 512, 256, True),
    (1, 256, 128, True),
    (20, 288, 128, False),
    (20, 1040, 256, True),
    (1, 1040, 128, False),
]
"""T, H, I, and whether there are biases; of the last three H is no whole number of blocks."""


@pytest.mark.gpu
@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "hidden", "intermediate", "bias"), CALLS)
def test_both_gemms(device, tokens, hidden, intermediate, bias, routing, name):
    block_m, tile = TILES[name]
    routes, rows = table_and_rows(device, routing, tokens, block_m, tile, hidden, intermediate)
    g = torch.Generator().manual_seed(tokens)
    x = (torch.randn(tokens, hidden, generator=g) * torch.rand(tokens, 1, generator=g) * 8).to(device, torch.bfloat16)
    topk_weights = torch.rand(tokens, TOP_K, generator=g).to(device)
    up_bias = torch.randn(LOCAL, 2 * intermediate, generator=g).to(device) if bias else None
    down_bias = torch.randn(LOCAL, hidden, generator=g).to(device) if bias else None

    w13 = random_block_fp8(device, 2 * intermediate, hidden, 1)
    y = poisoned(tokens * TOP_K, intermediate, device)
    torch.cuda.synchronize()  # weights and counters must be older than the kernel before
    launch_gate_up_sm90(x, w13, routes, TOP_K, ACTIVATION, tile, y, up_bias)
    want = gate_up_reference.gate_up(x, w13, routes, TOP_K, ACTIVATION, torch.float64, up_bias)
    check_rows(y, want, rows, FLOOR)

    w2 = random_block_fp8(device, hidden, intermediate, 2)
    out = poisoned(tokens * TOP_K, hidden, device)
    torch.cuda.synchronize()
    launch_down_sm90(y, w2, routes, topk_weights, tile, out, down_bias)
    want = down_reference.down(y.double(), w2, routes, topk_weights, torch.float64, down_bias)
    check_rows(out, want, rows, FLOOR)


@pytest.mark.gpu
def test_nan_tiny_and_large_numbers(device):
    """A NaN among the codes makes its row's results NaN and no others, a NaN scale its block's rows'."""
    tokens, hidden, intermediate = 37, 256, 256
    block_m, tile = TILES["8x64"]
    routes, rows = table_and_rows(device, "uniform", tokens, block_m, tile, hidden, intermediate)
    y = tiny_and_large(device, tokens * TOP_K, intermediate)
    topk_weights = torch.ones(tokens, TOP_K, device=device)
    clean = random_block_fp8(device, hidden, intermediate, 2)
    want = down_reference.down(y.double(), clean, routes, topk_weights, torch.float64)
    for code, column in ((0xFF, 70), (0x7F, 129), (0x7F, 255)):
        codes = clean.values.view(torch.uint8).clone()
        codes[:, 5, column] = code
        out = poisoned(tokens * TOP_K, hidden, device)
        launch(out, "down", y, BlockFP8(codes.view(torch.float8_e4m3fn), clean.scales), routes, tile, topk_weights)
        assert out[rows, 5].isnan().all()
        out[rows, 5] = want[rows, 5].to(out.dtype)
        check_rows(out, want, rows, FLOOR)
    scales = clean.scales.clone()
    scales[:, 1, 0] = torch.nan
    out = poisoned(tokens * TOP_K, hidden, device)
    launch(out, "down", y, BlockFP8(clean.values, scales), routes, tile, topk_weights)
    assert out[rows, BLOCK:].isnan().all()
    out[rows, BLOCK:] = want[rows, BLOCK:].to(out.dtype)
    check_rows(out, want, rows, FLOOR)


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [1, 4, 8])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_a_layer(device, tokens: int, routing: str, top_k: int) -> None:
    """Ragged, empty and crowded experts, skipped routes; the same bits again."""
    if (routing, top_k) == ("duplicates", 1):
        pytest.skip("it takes two routes")
    case = make_case(device, tokens, 288, 256, experts=24, local=5, top_k=top_k, routing=routing, scale=4.0)
    dense = case.weights.dense_experts
    weights = ExpertWeights((BlockFP8Experts(BlockFP8.quantize(dense.w13), BlockFP8.quantize(dense.w2)),))
    call = (case.hidden, weights, case.topk_weights, case.topk_ids, case.expert_map, ACTIVATION)
    want = run_reference(*call, compute=torch.float64)
    found = []
    for split in (4, 4, 1):
        tiles = LayerTiles.both(8, Sm90Tile(64, 128, 0, 4, 3, split_k=split))
        with poisoned_memory():
            found.append(run_in_tiles(Path.BLOCK_FP8, WeightFormat.BLOCK_FP8, tiles, case, weights))
        empty = want.abs().sum(1) == 0
        assert not found[-1][empty].any()
        assert empty.all() or snr_db(found[-1], want) > FLOOR
    assert same_bits(found[0], found[1])


@pytest.mark.parametrize("stage", ["gate_up", "down"])
@pytest.mark.parametrize(("split", "shares", "tail"), [(0, 1, False), (1, 2, False), (0, 1, True), (1, 2, True)])
@pytest.mark.parametrize("columns", [512, 288])
def test_a_tile_against_float64(columns: int, split: int, shares: int, tail: bool, stage: str) -> None:
    """The kernels' own code in numpy: padding rows of x, rows past the expert's last, K cut short, every scale."""
    rows = 208 if stage == "down" else 256  # of down the second tile ends in the middle of a panel
    weights = random_block_fp8("cpu", rows, columns, 1)
    x = torch.randn(TOKENS * FEW_K, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    tile, blocks = PlainTile(stage, LOCAL - 1, split, shares, tail), -(-columns // BLOCK)
    sizes = (rows, columns, blocks * BLOCK, -(-rows // 64))
    got = tile.run(x, Pointers.to_tensor(weights.values, FLOAT8), weights.scales, sizes, "codes_or_nan_to_bf16")
    made = torch.arange(128, rows)
    if stage == "gate_up":  # 8 gate rows and their 8 up rows in turn, from output 64 on
        row = torch.arange(128)
        made = 64 + row // 16 * 8 + row % 8 + row // 8 % 2 * (rows // 2)
    inside = tile.inside(blocks)
    want = weights.matrix(tile.expert, torch.float64)[made, inside] @ x[tile.reads, inside].double().T
    torch.testing.assert_close(torch.from_numpy(got)[: len(made), :4], want, rtol=1e-12, atol=1e-12)
    assert not got[:, 4:].any()


def test_a_row_of_codes_lies_in_two_parts() -> None:
    """Of 64 codes each; past the last row of the expert that one is read again."""
    block_n, columns = 128, 384
    with plain(sm90_gemm, sm90_layouts):
        row = sm90_gemm.rows_of_blocks(block_n)
        at = sm90_gemm.block_pointers(numbers(0), (3 + row) * columns)
    assert at.shape == (2, block_n, 64)
    for part in range(2):
        for offset in range(64):
            assert (at[part, :, offset] == (3 + np.arange(block_n)) * columns + part * 64 + offset).all()


def test_every_code_is_its_number_and_nan_is_nan() -> None:
    """At each of four places of a word; beside a NaN the others may be NaN."""
    text = assembly_of(sm90_codes.codes_or_nan_to_bf16)
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    want = codes.view(torch.float8_e4m3fn).double() / 256
    for first in range(len(codes)):
        four = [(first + place * 85) % len(codes) for place in range(4)]
        halves = run_ptx(text, [int(codes[index]) for index in four])
        assert torch.equal(halves.double(), want[four])
        for place, code in ((first % 4, 0x7F), (first // 4 % 4, 0xFF)):
            word = [int(codes[index]) for index in four]
            word[place] = code
            assert run_ptx(text, word).isnan().any()
