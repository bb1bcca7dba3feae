"""Hopper's FP8 products against float64, on what the rows became when they were quantised."""

from __future__ import annotations

import pytest
import torch

from epfuse import ExpertMap, ExpertWeights, SwiGLUOAI
from epfuse.config import Path, WeightFormat
from epfuse.stages.down import reference as down_reference
from epfuse.stages.gate_up import reference as gate_up_reference
from epfuse.stages.quantize.launch_packed import Bounds, launch_quantize_packed
from epfuse.stages.quantize.reference import quantize
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.route.table import LoneTokens
from epfuse.stages.tiles import LayerTiles, Sm90PersistentTile, Sm90RowsTile
from epfuse.tuning.calls import bind_layer, layer_call
from epfuse.verify.suite import same_bits
from epfuse.weights.panels import RowOrder
from epfuse.weights.row_fp8 import pack_rows
from tests.cases import ROUTINGS, packed_routes, routed, topk_ids_for
from tests.stages.test_sm90 import LOCAL, clone, poisoned, random_mxfp8, slots_on

pytestmark = pytest.mark.gpu

EXPERTS, TOP_K = 24, 4
ACTIVATION = SwiGLUOAI()
SNR = 45.0
"""dB, worst row: one rounding to BF16 is 52."""
ROUNDED = 25.0
"""The same for one rounding to E4M3, which is 31.5 in the mean: in float64 the worst of these rows have 27.0."""
TILES = {
    "16": (16, Sm90PersistentTile(192, 128, 0, 4, 5, parts=1)),
    "32": (32, Sm90PersistentTile(192, 128, 0, 4, 3, parts=1)),
    "96_head": (96, Sm90PersistentTile(192, 128, 2, 4, 5, parts=1, head=32)),
    "128_head": (128, Sm90PersistentTile(192, 128, 2, 4, 4, parts=1, head=64)),
    "144": (144, Sm90PersistentTile(192, 128, 2, 4, 4, parts=1)),
    "256_two_consumers": (256, Sm90PersistentTile(128, 128, 1, 4, 4, parts=1)),
    "288": (288, Sm90PersistentTile(128, 128, 1, 4, 4, parts=1)),
}


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate"),
    [(37, 256, 384), (300, 512, 256), (1, 256, 256), (20, 288, 160), (20, 96, 128)],
)
def test_both_gemms(device, tokens, hidden, intermediate, routing, name):
    from epfuse.stages.down.launch_sm90_fp8 import launch_down_sm90_fp8
    from epfuse.stages.gate_up.launch_sm90_fp8 import launch_gate_up_sm90_fp8

    block_m, tile = TILES[name]
    ids = topk_ids_for(routing, tokens, EXPERTS, LOCAL, TOP_K).to(device)
    routes = routed(ids, slots_on(device), LOCAL, block_m, arrivals_per_block=2)
    order = packed_routes(routes)
    local, rows = order.numel(), tokens * TOP_K
    g = torch.Generator().manual_seed(tokens)
    x = (torch.randn(tokens, hidden, generator=g) * torch.rand(tokens, 1, generator=g) * 8).to(device, torch.bfloat16)
    topk_weights = torch.rand(tokens, TOP_K, generator=g).to(device)

    w13 = random_mxfp8(device, 2 * intermediate, hidden, 1)
    y = poisoned(rows, intermediate, device)
    packed = pack_rows(clone(w13), RowOrder.GATE_UP)
    launch_gate_up_sm90_fp8(launch_quantize_packed(x, routes, TOP_K), packed, routes, ACTIVATION, tile, y)
    quantised = quantize(x, group=hidden).dequantize(torch.float64)
    want = gate_up_reference.gate_up(quantised, w13, routes, TOP_K, ACTIVATION, torch.float64)
    check(y[:local], want[order])
    assert y[local:].isnan().all()

    w2 = random_mxfp8(device, hidden, intermediate, 2)
    out = poisoned(rows, hidden, device)
    packed = pack_rows(clone(w2), RowOrder.PLAIN)
    launch_down_sm90_fp8(launch_quantize_packed(y, routes, None), packed, routes, topk_weights, tile, out)
    by_route = torch.zeros(rows, intermediate, dtype=torch.float64, device=device)
    by_route[order] = quantize(y[:local], group=intermediate).dequantize(torch.float64)
    check(out[:local], down_reference.down(by_route, w2, routes, topk_weights, torch.float64)[order])
    assert out[local:].isnan().all()


MANY = {f"rows_g{group_m}": (128, Sm90RowsTile(256, 128, group_m, 4, stages)) for group_m, stages in ((0, 3), (4, 4))}


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate"),
    [(37, 256, 768), (300, 512, 256), (1, 256, 256), (37, 224, 160), (2000, 256, 256)],
)
def test_both_gemms_in_one_launch(device, tokens, hidden, intermediate, routing, name):
    """Beside float64, rows of x where those of out will be; then each GEMM alone: the same bits."""
    from epfuse.stages.gate_up_down.launch_sm90_fp8_rows import launch_both

    block_m, tile = MANY[name]
    ids = topk_ids_for(routing, tokens, EXPERTS, LOCAL, TOP_K).to(device)
    routes = routed(ids, slots_on(device), LOCAL, block_m, arrivals_per_block=2)
    order = packed_routes(routes)
    local, rows = order.numel(), tokens * TOP_K
    g = torch.Generator().manual_seed(tokens)
    hidden_rows = torch.randn(tokens, hidden, generator=g) * torch.rand(tokens, 1, generator=g) * 8
    hidden_rows = hidden_rows.to(device, torch.bfloat16)
    topk_weights = torch.rand(tokens, TOP_K, generator=g).to(device)
    w13, w2 = random_mxfp8(device, 2 * intermediate, hidden, 1), random_mxfp8(device, hidden, intermediate, 2)
    up, down = pack_rows(clone(w13), RowOrder.GATE_UP), pack_rows(clone(w2), RowOrder.PLAIN)
    found = []
    for parts in ([(up, down)], [(up, None), (None, down)]):
        out, final = poisoned(rows, hidden, device), poisoned(tokens, hidden, device)
        lone = LoneTokens(ids, slots_on(device), LOCAL, ids.new_empty(rows, dtype=torch.int32), final, stored=True)
        scales = ids.new_full((rows, 1), 0x55, dtype=torch.uint8)
        x = FP8Rows(out.view(torch.float8_e4m3fn)[:, :hidden], torch.empty_like(scales), hidden)
        codes = torch.full((rows, intermediate), 0x55, dtype=torch.uint8, device=device)
        y = FP8Rows(codes.view(torch.float8_e4m3fn), scales, intermediate)
        launch_quantize_packed(hidden_rows, routes, TOP_K, x, lone=lone, bounds=Bounds(up.longest, ACTIVATION, scales))
        for first, second in parts:
            routes.arrivals.zero_()
            torch.cuda.synchronize()  # or the kernel would count before it has waited for this
            launch_both(x, first, second, routes, topk_weights, ACTIVATION, tile, y, out, lone)
        alone = (lone.of_row[:local] >= 0).nonzero().squeeze(1)
        out[alone] = final[lone.of_row[alone].long()]
        found.append((codes, out[:local]))
    assert torch.equal(found[0][0], found[1][0])
    assert same_bits(found[0][1], found[1][1])
    assert (codes[local:] == 0x55).all()
    quantised = quantize(hidden_rows, group=hidden).dequantize(torch.float64)
    want = gate_up_reference.gate_up(quantised, w13, routes, TOP_K, ACTIVATION, torch.float64)
    got = y.dequantize(torch.float64)[:local]
    check(got, want[order], ROUNDED)
    by_route = torch.zeros(rows, intermediate, dtype=torch.float64, device=device)
    by_route[order] = got
    check(found[0][1], down_reference.down(by_route, w2, routes, topk_weights, torch.float64)[order])


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate"), [(300, 512, 256), (1, 256, 256), (37, 224, 160), (2000, 256, 256)]
)
def test_each_gemm_of_many_rows(device, tokens, hidden, intermediate, routing, name):
    """As where no bound is known: BF16 between them."""
    from epfuse.stages.gate_up_down.launch_sm90_fp8_rows import launch_down, launch_gate_up

    block_m, tile = MANY[name]
    ids = topk_ids_for(routing, tokens, EXPERTS, LOCAL, TOP_K).to(device)
    routes = routed(ids, slots_on(device), LOCAL, block_m, arrivals_per_block=2)
    order = packed_routes(routes)
    local, rows = order.numel(), tokens * TOP_K
    g = torch.Generator().manual_seed(tokens)
    x = (torch.randn(tokens, hidden, generator=g) * torch.rand(tokens, 1, generator=g) * 8).to(device, torch.bfloat16)
    topk_weights = torch.rand(tokens, TOP_K, generator=g).to(device)
    w13, w2 = random_mxfp8(device, 2 * intermediate, hidden, 1), random_mxfp8(device, hidden, intermediate, 2)
    up, down = pack_rows(clone(w13), RowOrder.GATE_UP), pack_rows(clone(w2), RowOrder.PLAIN)
    y, out = poisoned(rows, intermediate, device), poisoned(rows, hidden, device)
    launch_gate_up(launch_quantize_packed(x, routes, TOP_K), up, routes, ACTIVATION, tile, y)
    between = launch_quantize_packed(y, routes, None)
    launch_down(between, down, routes, topk_weights, tile, out, activation=ACTIVATION)
    quantised = quantize(x, group=hidden).dequantize(torch.float64)
    want = gate_up_reference.gate_up(quantised, w13, routes, TOP_K, ACTIVATION, torch.float64)
    check(y[:local], want[order])
    assert y[local:].isnan().all()
    by_route = torch.zeros(rows, intermediate, dtype=torch.float64, device=device)
    by_route[order] = between.dequantize(torch.float64)[:local]
    check(out[:local], down_reference.down(by_route, w2, routes, topk_weights, torch.float64)[order])
    assert out[local:].isnan().all()


def test_nan_and_tiny_rows_keep_to_themselves(device):
    """A NaN makes its token NaN and no other; scale byte 0 stands for 2^-127, which only a tiny row has."""
    from epfuse.stages.gate_up.launch_sm90_fp8 import launch_gate_up_sm90_fp8

    tokens, hidden, intermediate = 37, 256, 384
    nan, tiny = 3, 11
    ids = topk_ids_for("uniform", tokens, EXPERTS, LOCAL, TOP_K)
    ids[[nan, tiny], 0] = 2
    w13, w2 = random_mxfp8(device, 2 * intermediate, hidden, 1), random_mxfp8(device, hidden, intermediate, 2)
    weights = ExpertWeights.mxfp8(w13.values, w13.scales, w2.values, w2.scales)
    reference = weights.mxfp8_experts
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    x[tiny] *= 5e-37
    assert quantize(x[tiny : tiny + 1].cpu(), group=hidden).scales.item() == 0
    block_m, tile = TILES["16"]
    routes = routed(ids.int().to(device), slots_on(device), LOCAL, block_m, arrivals_per_block=2)
    order = packed_routes(routes)
    quantised = quantize(x, group=hidden).dequantize(torch.float64)
    want = gate_up_reference.gate_up(quantised, reference.w13, routes, TOP_K, ACTIVATION, torch.float64)[order]
    packed = pack_rows(clone(reference.w13), RowOrder.GATE_UP)
    got = []
    for poison in (False, True):
        if poison:
            x[nan, 100] = float("nan")
        routes.arrivals.zero_()
        rows = launch_quantize_packed(x, routes, TOP_K)
        y = x.new_empty(rows.values.shape[0], want.shape[1])
        got.append(launch_gate_up_sm90_fp8(rows, packed, routes, ACTIVATION, tile, y)[: order.numel()])
    check(got[0], want)
    is_nan = order // TOP_K == nan
    assert is_nan.any()
    assert (order // TOP_K == tiny).any()
    assert got[1][is_nan].isnan().all()
    torch.testing.assert_close(got[1][~is_nan], got[0][~is_nan], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["96_head", "128_head", "144", "256_two_consumers", "288"])
@pytest.mark.parametrize(
    "counts",
    [
        (1, 32, 33, 64, 65),
        (80, 81, 96, 97, 129),
        (127, 128, 129, 144, 145),
        (0, 257, 1, 0, 300),
        (288, 289, 255, 256, 577),
    ],
)
def test_every_number_of_columns(device, counts, name):
    """The rows of an expert fill a block to any degree: bit for bit what blocks of 16 make."""
    hidden, intermediate = 512, 384
    flat = torch.repeat_interleave(torch.arange(LOCAL), torch.tensor(counts))
    tokens = flat.numel() // 2 + 1
    ids = torch.full((tokens * TOP_K,), EXPERTS - 1)
    ids[torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(1))[: flat.numel()]] = flat
    ids = ids.view(tokens, TOP_K).int().to(device)
    w13, w2 = random_mxfp8(device, 2 * intermediate, hidden, 1), random_mxfp8(device, hidden, intermediate, 2)
    weights = ExpertWeights.mxfp8(w13.values, w13.scales, w2.values, w2.scales).prepare(path=Path.W8A8)
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    topk_weights = torch.rand(tokens, TOP_K, device=device)
    found = []
    for block_m, tile in (TILES["16"], TILES[name]):
        operands = (x, topk_weights, ids, ExpertMap(slots_on(device)), ACTIVATION)
        call = layer_call(WeightFormat.ROW_FP8, weights, *operands)
        call.out.fill_(float("nan"))
        found.append(bind_layer(Path.W8A8, WeightFormat.ROW_FP8, LayerTiles(block_m, tile, tile), call)())
    assert same_bits(found[0], found[1])


def check(got: torch.Tensor, want: torch.Tensor, least: float = SNR) -> None:
    """Every row on its own."""
    if not want.numel():
        return
    noise = (got.double() - want).square().sum(1)
    signal = want.double().square().sum(1)
    assert not noise.isnan().any()
    decibels = 10 * torch.log10(signal / noise.clamp(min=1e-300))
    assert decibels[signal > 0].min() >= least
