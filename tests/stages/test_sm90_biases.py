"""The Hopper kernels with biases: each against float64, on every kind of routing, in every way of sharing a tile."""

from __future__ import annotations

import pytest
import torch

from epfuse import SwiGLUOAI
from epfuse.stages.down import reference as down_reference
from epfuse.stages.down.launch_sm90 import launch_down_sm90
from epfuse.stages.gate_up import reference as gate_up_reference
from epfuse.stages.gate_up.launch_sm90 import launch_gate_up_sm90
from epfuse.stages.gate_up_down.launch import launch_gate_up_down
from epfuse.stages.gather.launch import LoneTokens, launch_gather
from epfuse.stages.quantize.launch_packed import launch_quantize_packed
from epfuse.stages.quantize.reference import quantize
from epfuse.stages.tiles import Sm90PersistentTile, Sm90Tile
from epfuse.verify.suite import same_bits
from epfuse.weights.fragment import pack
from epfuse.weights.panels import RowOrder
from epfuse.weights.row_fp8 import pack_rows
from tests.cases import ROUTINGS, routed, snr_db, topk_ids_for
from tests.stages.test_gemms import SNR_FLOOR, check_rows
from tests.stages.test_sm90 import EXPERTS, LOCAL, TILES, TOP_K, clone, poisoned, random_mxfp8, slots_on, table_of
from tests.stages.test_sm90_fp8 import check

pytestmark = pytest.mark.gpu

ACTIVATION = SwiGLUOAI()
FLOOR = SNR_FLOOR[torch.bfloat16]
SIZES = [(37, 256, 384), (300, 512, 256), (1, 256, 256), (20, 288, 160), (20, 2880, 96)]
"""T, H, I; the last two are no whole tiles."""

FEW = {
    "8x64": (8, Sm90Tile(64, 128, 0, 4, 4)),
    "8x64_split": (8, Sm90Tile(64, 128, 0, 4, 3, split_k=4)),
    "16x128_8warps": (16, Sm90Tile(128, 128, 0, 8, 4)),
    "64x64_split": (64, Sm90Tile(64, 128, 0, 4, 3, split_k=4)),
    "64x128_grouped": (64, Sm90Tile(128, 128, 2, 8, 3)),
}
PERSISTENT = {
    "64x192_head": (64, Sm90PersistentTile(192, 128, 0, 4, 5, parts=1, head=32)),
    "144x192": (144, Sm90PersistentTile(192, 128, 2, 4, 2, parts=4)),
    "288x128": (288, Sm90PersistentTile(128, 64, 2, 4, 5)),
}
FP8 = {
    "96_head": (96, Sm90PersistentTile(192, 128, 2, 4, 5, parts=1, head=32)),
    "128_two_consumers": (128, Sm90PersistentTile(128, 128, 1, 4, 4, parts=1)),
}


class Layer:
    """A rank's routes, rows, weights, and biases as large as the products they are added to."""

    def __init__(self, device: torch.device, tokens: int, hidden: int, intermediate: int, routing: str) -> None:
        g = torch.Generator().manual_seed(tokens + hidden)
        self.ids = topk_ids_for(routing, tokens, EXPERTS, LOCAL, TOP_K).to(device)
        self.slots = slots_on(device)
        self.x = torch.randn(tokens, hidden, generator=g).to(device, torch.bfloat16)
        self.topk_weights = torch.rand(tokens, TOP_K, generator=g).to(device)
        self.w13, self.w2 = (
            random_mxfp8(device, rows, columns, seed)
            for seed, (rows, columns) in enumerate([(2 * intermediate, hidden), (hidden, intermediate)])
        )
        self.up_bias = torch.randn(LOCAL, 2 * intermediate, generator=g).to(device)
        self.down_bias = torch.randn(LOCAL, hidden, generator=g).to(device)
        self.sizes = (hidden, intermediate)
        self.local = ((self.ids >= 0) & (self.ids < LOCAL)).reshape(-1).nonzero().squeeze(1)

    def wanted(self, routes, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[R, I]`` of gate_up and ``[R, H]`` of down for rows ``y``, without a rounding."""
        first = (self.x, self.w13, routes, TOP_K, ACTIVATION, torch.float64, self.up_bias)
        second = (y.double(), self.w2, routes, self.topk_weights, torch.float64, self.down_bias)
        return gate_up_reference.gate_up(*first), down_reference.down(*second)

    def packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """w13 and w2 in fragment order."""
        return pack(clone(self.w13), RowOrder.GATE_UP), pack(clone(self.w2), RowOrder.PLAIN)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "hidden", "intermediate"), SIZES)
def test_few_rows(device, tokens, hidden, intermediate, routing, name):
    """MXFP8 beside float64, and dense weights beside MXFP8 bit for bit."""
    layer, (block_m, tile) = Layer(device, tokens, hidden, intermediate, routing), FEW[name]
    found = []
    for first, second in (layer.packed(), (layer.w13.dequantize(), layer.w2.dequantize())):
        routes = table_of(layer.ids, layer.slots, block_m, tile, hidden, intermediate)
        y, out = poisoned(tokens * TOP_K, intermediate, device), poisoned(tokens * TOP_K, hidden, device)
        torch.cuda.synchronize()  # weights and counters must be older than the kernel before
        launch_gate_up_sm90(layer.x, first, routes, TOP_K, ACTIVATION, tile, y, layer.up_bias)
        launch_down_sm90(y, second, routes, layer.topk_weights, tile, out, layer.down_bias)
        found.append((y, out))
    want_y, want = layer.wanted(routes, found[0][0])
    check_rows(found[0][0], want_y, layer.local, FLOOR)
    check_rows(found[0][1], want, layer.local, FLOOR)
    assert all(same_bits(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("name", PERSISTENT)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "hidden", "intermediate"), [*SIZES, (2000, 640, 320)])
def test_many_rows_in_one_launch(device, tokens, hidden, intermediate, routing, name):
    """Each GEMM alone, then both at once with lone rows where they belong: the same bits, beside float64."""
    layer, (block_m, tile) = Layer(device, tokens, hidden, intermediate, routing), PERSISTENT[name]
    (w13, w2), rows = layer.packed(), tokens * TOP_K
    biases = {"gate_up_bias": layer.up_bias, "down_bias": layer.down_bias}
    routes = table_of(layer.ids, layer.slots, block_m, tile, hidden, intermediate)
    order = torch.cat([group for _, group in routes.groups()] or [layer.local])
    count, router = order.numel(), layer.topk_weights
    x = launch_gather(layer.x, routes, TOP_K, poisoned(rows, hidden, device))
    y, out = poisoned(rows, intermediate, device), poisoned(rows, hidden, device)
    for first, second in ((w13, None), (None, w2)):
        routes.arrivals.zero_()
        torch.cuda.synchronize()  # or the kernel would count before it has waited for this
        launch_gate_up_down(x, first, second, routes, router, ACTIVATION, tile, y, out, **biases)
    by_route = poisoned(rows, intermediate, device)
    by_route[order] = y[:count]
    want_y, want = layer.wanted(routes, by_route)
    check(y[:count], want_y[order])
    check(out[:count], want[order])
    assert y[count:].isnan().all()
    assert out[count:].isnan().all()

    routes = table_of(layer.ids, layer.slots, block_m, tile, hidden, intermediate)
    final = poisoned(tokens, hidden, device)
    lone = LoneTokens(layer.ids, layer.slots, LOCAL, layer.slots.new_empty(rows), final, stored=True)
    x = launch_gather(layer.x, routes, TOP_K, poisoned(rows, hidden, device), lone=lone)
    between = poisoned(rows, intermediate, device)
    launch_gate_up_down(x, w13, w2, routes, router, ACTIVATION, tile, between, x, lone, **biases)
    of_row = lone.of_row[:count].long()
    alone = (of_row >= 0).nonzero().squeeze(1)
    x[alone] = final[of_row[alone]]
    assert same_bits(between, y)
    assert same_bits(x[:count], out[:count])


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "hidden", "intermediate"), SIZES)
def test_fp8_rows(device, tokens, hidden, intermediate, routing, name):
    from epfuse.stages.down.launch_sm90_fp8 import launch_down_sm90_fp8
    from epfuse.stages.gate_up.launch_sm90_fp8 import launch_gate_up_sm90_fp8

    layer, (block_m, tile) = Layer(device, tokens, hidden, intermediate, routing), FP8[name]
    routes, rows = routed(layer.ids, layer.slots, LOCAL, block_m, arrivals_per_block=2), tokens * TOP_K
    order = torch.cat([group for _, group in routes.groups()] or [layer.local])
    count, router = order.numel(), layer.topk_weights
    y, out = poisoned(rows, intermediate, device), poisoned(rows, hidden, device)
    w13, w2 = pack_rows(clone(layer.w13), RowOrder.GATE_UP), pack_rows(clone(layer.w2), RowOrder.PLAIN)
    x = launch_quantize_packed(layer.x, routes, TOP_K)
    launch_gate_up_sm90_fp8(x, w13, routes, ACTIVATION, tile, y, layer.up_bias)
    launch_down_sm90_fp8(launch_quantize_packed(y, routes, None), w2, routes, router, tile, out, bias=layer.down_bias)
    layer.x = quantize(layer.x, group=hidden).dequantize(torch.float64)
    by_route = torch.zeros(rows, intermediate, dtype=torch.float64, device=device)
    by_route[order] = quantize(y[:count], group=intermediate).dequantize(torch.float64)
    want_y, want = layer.wanted(routes, by_route)
    check(y[:count], want_y[order])
    check(out[:count], want[order])
    assert y[count:].isnan().all()
    assert out[count:].isnan().all()


@pytest.mark.parametrize("name", ["8x64_split", "64x128_grouped"])
def test_biases_of_zero_change_nothing(device, name):
    """The kernel with biases rounds where the one without does."""
    tokens, hidden, intermediate = 37, 256, 384
    layer, (block_m, tile) = Layer(device, tokens, hidden, intermediate, "uniform"), FEW[name]
    w13, w2 = layer.packed()
    found = []
    for up_bias, down_bias in ((None, None), (layer.up_bias * 0, layer.down_bias * 0)):
        routes = table_of(layer.ids, layer.slots, block_m, tile, hidden, intermediate)
        torch.cuda.synchronize()
        y, out = (poisoned(tokens * TOP_K, width, device) for width in (intermediate, hidden))
        launch_gate_up_sm90(layer.x, w13, routes, TOP_K, ACTIVATION, tile, y, up_bias)
        launch_down_sm90(y, w2, routes, layer.topk_weights, tile, out, down_bias)
        found.append((y[layer.local] + 0.0, out[layer.local] + 0.0))  # -0 + 0 is 0
    assert all(same_bits(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["8x64_split", "16x128_8warps", "64x128_grouped", "128x256"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(288, 160), (2880, 96), (96, 32)])
def test_dense_rows_end_where_the_next_begin(device, hidden, intermediate, name):
    """Columns that are no whole steps: an expert of NaN beside the others is not read for them."""
    block_m, tile = TILES[name] if name in TILES else FEW[name]
    layer, bad = Layer(device, 37, hidden, intermediate, "uniform"), 2
    w13, w2 = layer.w13.dequantize(), layer.w2.dequantize()
    w13[bad], w2[bad] = float("nan"), float("nan")
    routes = table_of(layer.ids, layer.slots, block_m, tile, hidden, intermediate)
    y, out = poisoned(37 * TOP_K, intermediate, device), poisoned(37 * TOP_K, hidden, device)
    torch.cuda.synchronize()
    launch_gate_up_sm90(layer.x, w13, routes, TOP_K, ACTIVATION, tile, y, layer.up_bias)
    launch_down_sm90(y, w2, routes, layer.topk_weights, tile, out, layer.down_bias)
    good = layer.local[layer.ids.reshape(-1)[layer.local] != bad]
    want_y, want = layer.wanted(routes, y)
    assert snr_db(y[good], want_y[good]) > FLOOR
    assert snr_db(out[good], want[good]) > FLOOR
