"""Hopper's persistent kernel of dense weights: against float64, and bit for bit against the kernels of few rows."""

from __future__ import annotations

import pytest
import torch

from epfuse import ExpertMap, ExpertWeights, SwiGLUOAI
from epfuse.config import Path, WeightFormat
from epfuse.stages.down import reference as down_reference
from epfuse.stages.gate_up import reference as gate_up_reference
from epfuse.stages.gate_up_down.launch_dense import launch_gate_up_down_dense
from epfuse.stages.gather.launch import LoneTokens, launch_gather
from epfuse.stages.tiles import GemmTile, LayerTiles, Sm90DenseTile, Sm90Tile
from epfuse.tuning.calls import bind_layer, layer_call
from epfuse.verify.suite import same_bits
from tests.cases import ROUTINGS, topk_ids_for
from tests.stages.test_gemms import SNR_FLOOR, check_rows
from tests.stages.test_sm90 import EXPERTS, LOCAL, TOP_K, poisoned, slots_on, table_of

pytestmark = pytest.mark.gpu

ACTIVATION = SwiGLUOAI()
FLOOR = SNR_FLOOR[torch.bfloat16]
TILES = {
    "32x256": (32, Sm90DenseTile(256, 64, 0, 4, 5)),
    "64x128_head": (64, Sm90DenseTile(128, 64, 1, 4, 6, head=32)),
    "96x192_head": (96, Sm90DenseTile(192, 64, 2, 4, 4, head=32)),
    "128x192": (128, Sm90DenseTile(192, 64, 4, 4, 4)),
    "192x192": (192, Sm90DenseTile(192, 64, 1, 4, 3)),
    "272x192_shared": (272, Sm90DenseTile(192, 64, 4, 4, 3)),
    "96x128": (96, Sm90DenseTile(128, 64, 1, 4, 7)),
    "144x128": (144, Sm90DenseTile(128, 64, 1, 4, 6)),
    "144x256": (144, Sm90DenseTile(256, 64, 1, 4, 4)),
    "192x256": (192, Sm90DenseTile(256, 64, 2, 4, 3)),
    "192x256_g8": (192, Sm90DenseTile(256, 64, 8, 4, 3)),
    "256x128": (256, Sm90DenseTile(128, 64, 8, 4, 4)),
    "288x128": (288, Sm90DenseTile(128, 64, 2, 4, 4)),
}
FEW = LayerTiles.both(16, Sm90Tile(128, 64, 0, 4, 3))


class Layer:
    """A rank's routes, rows, dense weights, and biases as large as the products they are added to."""

    def __init__(self, device: torch.device, tokens: int, hidden: int, intermediate: int, ids: torch.Tensor) -> None:
        g = torch.Generator().manual_seed(tokens + hidden)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=g)

        self.ids, self.slots = ids.to(device), slots_on(device)
        self.x = normal(tokens, hidden).to(device, torch.bfloat16)
        self.topk_weights = torch.rand(tokens, TOP_K, generator=g).to(device)
        self.w13 = (normal(LOCAL, 2 * intermediate, hidden) * hidden**-0.5).to(device, torch.bfloat16)
        self.w2 = (normal(LOCAL, hidden, intermediate) * intermediate**-0.5).to(device, torch.bfloat16)
        self.up_bias, self.down_bias = normal(LOCAL, 2 * intermediate).to(device), normal(LOCAL, hidden).to(device)

    def run(self, tiles: LayerTiles, biases: bool = False) -> torch.Tensor:
        """The whole call, into memory full of NaN."""
        added = {"gate_up_bias": self.up_bias, "down_bias": self.down_bias} if biases else {}
        weights = ExpertWeights(ExpertWeights.bf16(self.w13, self.w2).formats, **added)
        operands = (self.x, self.topk_weights, self.ids, ExpertMap(self.slots), ACTIVATION)
        call = layer_call(WeightFormat.DENSE, weights, *operands)
        call.out.fill_(float("nan"))
        return bind_layer(Path.BF16, WeightFormat.DENSE, tiles, call)()


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate", "biases"),
    [
        (37, 256, 384, False),
        (300, 512, 256, True),
        (1, 256, 256, False),
        (20, 288, 160, True),
        (20, 2880, 96, False),
        (45, 80, 48, True),
        (2000, 640, 320, False),
    ],
)
def test_each_gemm_alone_then_both_at_once(device, tokens, hidden, intermediate, biases, routing, name):
    """Each beside float64; then both in one launch, with lone rows where they belong: the same bits."""
    block_m, tile = TILES[name]
    layer = Layer(device, tokens, hidden, intermediate, topk_ids_for(routing, tokens, EXPERTS, LOCAL, TOP_K))
    up_bias, down_bias = (layer.up_bias, layer.down_bias) if biases else (None, None)
    routes = table_of(layer.ids, layer.slots, block_m, tile, hidden, intermediate)
    order = torch.cat([group for _, group in routes.groups()] or [torch.empty(0, dtype=torch.long, device=device)])
    count, rows, router = order.numel(), tokens * TOP_K, layer.topk_weights
    # no row is final, but the kernel is the one that a call compiles
    lone = LoneTokens(layer.ids, layer.slots, LOCAL, layer.slots.new_empty(rows), layer.x, stored=False)
    x = launch_gather(layer.x, routes, TOP_K, poisoned(rows, hidden, device), lone=lone)
    y, out = poisoned(rows, intermediate, device), poisoned(rows, hidden, device)
    for first, second in ((layer.w13, None), (None, layer.w2)):
        routes.arrivals.zero_()
        torch.cuda.synchronize()  # or the kernel would count before it has waited for this
        launch_gate_up_down_dense(
            x, first, second, routes, router, ACTIVATION, tile, y, out, lone, up_bias, down_bias
        )  # fmt: skip
    by_route, results = poisoned(rows, intermediate, device), poisoned(rows, hidden, device)
    by_route[order], results[order] = y[:count], out[:count]
    want = gate_up_reference.gate_up(layer.x, layer.w13, routes, TOP_K, ACTIVATION, torch.float64, up_bias)
    check_rows(by_route, want, order, FLOOR)
    want = down_reference.down(by_route.double(), layer.w2, routes, router, torch.float64, down_bias)
    check_rows(results, want, order, FLOOR)
    assert y[count:].isnan().all()
    assert out[count:].isnan().all()

    routes = table_of(layer.ids, layer.slots, block_m, tile, hidden, intermediate)
    final = poisoned(tokens, hidden, device)
    lone = LoneTokens(layer.ids, layer.slots, LOCAL, layer.slots.new_empty(rows), final, stored=True)
    x = launch_gather(layer.x, routes, TOP_K, poisoned(rows, hidden, device), lone=lone)
    between, both = poisoned(rows, intermediate, device), (layer.w13, layer.w2)
    launch_gate_up_down_dense(x, *both, routes, router, ACTIVATION, tile, between, x, lone, up_bias, down_bias)
    of_row = lone.of_row[:count].long()
    alone = (of_row >= 0).nonzero().squeeze(1)
    x[alone] = final[of_row[alone]]
    assert same_bits(between, y)
    assert same_bits(x[:count], out[:count])


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("biases", [False, True])
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
def test_every_number_of_columns(device, counts, biases, name):
    """The rows of an expert fill a block to any degree: bit for bit what blocks of 16 of the other kernels make."""
    flat = torch.repeat_interleave(torch.arange(LOCAL), torch.tensor(counts))
    tokens = flat.numel() // 2 + 1
    ids = torch.full((tokens * TOP_K,), EXPERTS - 1)
    ids[torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(1))[: flat.numel()]] = flat
    layer = Layer(device, tokens, 512, 384, ids.view(tokens, TOP_K).int())
    assert same_bits(layer.run(LayerTiles.both(*TILES[name]), biases), layer.run(FEW, biases))


@pytest.mark.parametrize("name", TILES)
def test_a_nan_keeps_to_its_token(device, name):
    ids = topk_ids_for("uniform", 200, EXPERTS, LOCAL, TOP_K).int()
    ids[7, 0] = 2
    layer = Layer(device, 200, 256, 192, ids)
    layer.x[7, 100] = float("nan")
    assert layer.run(LayerTiles.both(*TILES[name])).isnan().any(1).nonzero().flatten().tolist() == [7]


def test_repeats(device):
    layer = Layer(device, 3000, 768, 512, topk_ids_for("uniform", 3000, EXPERTS, LOCAL, TOP_K).int())
    tiles: GemmTile = TILES["288x128"][1]
    first = layer.run(LayerTiles.both(288, tiles))
    assert all(same_bits(layer.run(LayerTiles.both(288, tiles)), first) for _ in range(20))
