"""Hopper's FP8 products on block FP8 weights against float64, each GEMM on the FP8 rows that it was given."""

from __future__ import annotations

import pytest
import torch

from epfuse import SwiGLUOAI
from epfuse.stages.activation_reference import activated
from epfuse.stages.quantize.launch_packed import launch_quantize_packed
from epfuse.stages.quantize.reference import quantize
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.tiles import Sm90BlockTile
from epfuse.verify.suite import same_bits
from epfuse.weights.block_fp8 import BLOCK, BlockFP8
from tests.cases import ROUTINGS, packed_routes, routed, topk_ids_for
from tests.families.test_sm90_fp8 import rows_by_expert
from tests.stages.test_sm90 import EXPERTS, LOCAL, TOP_K, poisoned, slots_on
from tests.stages.test_sm90_fp8 import check

pytestmark = pytest.mark.gpu

ACTIVATION = SwiGLUOAI()
OTHER_CODES = 0.03
"""Of y's codes: the tensor cores add FP8 products with fewer bits than FP32 has, so that a sum may be rounded to the
next BF16, and that to the next E4M3. Some 2 % are, in the portable kernels too."""
TILES = {
    "16": (16, 6, 128, 10),
    "32": (32, 5, 256, 5),
    "64": (64, 5, 128, 8),
    "128": (128, 4, 256, 4),
}


def tiles_of(name: str) -> tuple[int, Sm90BlockTile, Sm90BlockTile]:
    block_m, stages, block_n, down_stages = TILES[name]
    return block_m, Sm90BlockTile(256, BLOCK, 2, 4, stages), Sm90BlockTile(block_n, BLOCK, 2, 4, down_stages)


def random_block_fp8(device, rows: int, columns: int, seed: int) -> BlockFP8:
    """Every code but NaN, and scales that are no powers of two."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 127, (LOCAL, rows, columns), generator=g, dtype=torch.uint8)
    codes |= torch.randint(0, 2, codes.shape, generator=g, dtype=torch.uint8) * 128
    scales = (0.25 + torch.rand(LOCAL, -(-rows // BLOCK), -(-columns // BLOCK), generator=g)) / 68 / columns**0.5
    return BlockFP8(codes.view(torch.float8_e4m3fn).to(device), scales.to(device))


def empty_rows(rows: int, columns: int, device) -> FP8Rows:
    """Every byte 0x55."""
    out = FP8Rows.empty(rows, columns, BLOCK, torch.float8_e4m3fn, device)
    out.values.view(torch.uint8).fill_(0x55)
    out.scales.fill_(0x55)
    return out


def check_codes(codes: torch.Tensor, made: torch.Tensor, want: FP8Rows) -> None:
    """Few codes differ, as many as so few of them may by chance, and each by a step, or by little where sums cancel."""
    differ, count = int((codes.view(torch.uint8) != want.values.view(torch.uint8)).sum()), codes.numel()
    assert differ < OTHER_CODES * count + 4 * (OTHER_CODES * count) ** 0.5
    numbers = want.dequantize(torch.float64)
    largest = numbers.abs().view(numbers.shape[0], -1, BLOCK).amax(2).repeat_interleave(BLOCK, 1)
    assert ((made - numbers).abs() <= numbers.abs() / 8 + largest / 128).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "hidden", "intermediate"), [(1, 256, 128), (37, 288, 384), (300, 1040, 256)])
def test_both_gemms(device, tokens, hidden, intermediate, routing, name, bias):
    from epfuse.stages.down.launch_sm90_block_fp8 import launch_down_sm90_block_fp8
    from epfuse.stages.gate_up.launch_sm90_block_fp8 import launch_gate_up_sm90_block_fp8

    block_m, up_tile, down_tile = tiles_of(name)
    ids = topk_ids_for(routing, tokens, EXPERTS, LOCAL, TOP_K).to(device)
    routes = routed(ids, slots_on(device), LOCAL, block_m, arrivals_per_block=2)
    rows = tokens * TOP_K
    g = torch.Generator().manual_seed(tokens)
    x = (torch.randn(tokens, hidden, generator=g) * torch.rand(tokens, 1, generator=g) * 8).to(device, torch.bfloat16)
    topk_weights = torch.rand(tokens, TOP_K, generator=g).to(device)
    w13 = random_block_fp8(device, 2 * intermediate, hidden, 1)
    w2 = random_block_fp8(device, hidden, intermediate, 2)
    up_bias = torch.randn(LOCAL, 2 * intermediate, generator=g).to(device) if bias else None
    down_bias = torch.randn(LOCAL, hidden, generator=g).to(device) if bias else None

    packed = launch_quantize_packed(x, routes, TOP_K, empty_rows(rows, hidden, device))
    y = empty_rows(rows, intermediate, device)
    launch_gate_up_sm90_block_fp8(packed, w13, routes, ACTIVATION, up_tile, y, up_bias)
    out = poisoned(rows, hidden, device)
    launch_down_sm90_block_fp8(y, w2, routes, topk_weights, down_tile, out, bias=down_bias)
    quantised = quantize(x, BLOCK).dequantize(torch.float64)
    local = 0
    for expert, at, found in rows_by_expert(routes):
        local = at.stop
        sums = quantised[found // TOP_K] @ w13.matrix(expert, torch.float64).T
        sums = sums if up_bias is None else sums + up_bias[expert].double()
        want = quantize(activated(sums.bfloat16().float(), ACTIVATION), BLOCK)
        made = FP8Rows(y.values[at], y.scales[at], BLOCK).dequantize(torch.float64)
        check_codes(y.values[at], made, want)
        result = made @ w2.matrix(expert, torch.float64).T
        result = result if down_bias is None else result + down_bias[expert].double()
        check(out[at], result * topk_weights.view(-1)[found, None].double())
    assert (y.values[local:].view(torch.uint8) == 0x55).all()
    assert (y.scales[local:] == 0x55).all()
    assert out[local:].isnan().all()


def test_nan_and_tiny_rows_keep_to_themselves(device):
    """A NaN makes its group of its token NaN, and so that token; scale byte 0 stands for 2^-127."""
    from epfuse.stages.gate_up.launch_sm90_block_fp8 import launch_gate_up_sm90_block_fp8

    tokens, hidden, intermediate, nan, tiny = 37, 256, 256, 3, 11
    ids = topk_ids_for("uniform", tokens, EXPERTS, LOCAL, TOP_K)
    ids[[nan, tiny], 0] = 2
    w13 = random_block_fp8(device, 2 * intermediate, hidden, 1)
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    x[tiny] *= 5e-37
    for name in ("16", "128"):
        block_m, tile, _ = tiles_of(name)
        routes = routed(ids.int().to(device), slots_on(device), LOCAL, block_m, arrivals_per_block=2)
        order = packed_routes(routes)
        got = []
        for poison in (False, True):
            given = x.clone()
            if poison:
                given[nan, 100] = float("nan")
            routes.arrivals.zero_()
            rows = launch_quantize_packed(given, routes, TOP_K, empty_rows(tokens * TOP_K, hidden, device))
            made = empty_rows(tokens * TOP_K, w13.shape[1] // 2, device)
            launch_gate_up_sm90_block_fp8(rows, w13, routes, ACTIVATION, tile, made)
            got.append(made.dequantize()[: order.numel()])
        is_nan = order // TOP_K == nan
        assert is_nan.any()
        assert (order // TOP_K == tiny).any()
        assert got[1][is_nan].isnan().all()
        assert same_bits(got[1][~is_nan], got[0][~is_nan])
        assert not got[0].isnan().any()
