"""The Hopper kernels: against the reference, and MXFP8 in registers bit for bit against the same weights in memory."""

from __future__ import annotations

import pytest
import torch

from epfuse import SwiGLUOAI
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.stages import sm90_launch
from epfuse.stages.down import reference as down_reference
from epfuse.stages.down.launch_sm90 import launch_down_sm90
from epfuse.stages.gate_up import reference as gate_up_reference
from epfuse.stages.gate_up.launch_sm90 import launch_gate_up_sm90
from epfuse.stages.gate_up_down.launch import launch_gate_up_down
from epfuse.stages.gather.launch import LoneTokens, launch_gather
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import LayerTiles, Sm90PersistentTile, Sm90Tile
from epfuse.weights.fragment import pack
from epfuse.weights.panels import RowOrder
from tests.cases import ROUTINGS, first_experts, packed_routes, routed, topk_ids_for
from tests.stages.test_gemms import SNR_FLOOR, check_rows

pytestmark = pytest.mark.gpu

ACTIVATION = SwiGLUOAI()
LOCAL, EXPERTS, TOP_K = 5, 24, 4

TILES = {
    "8x64": (8, Sm90Tile(64, 128, 0, 4, 4)),
    "8x64_split": (8, Sm90Tile(64, 128, 0, 4, 3, split_k=4)),
    "8x64_long_split": (8, Sm90Tile(64, 128, 0, 4, 6, split_k=4)),
    "8x128": (8, Sm90Tile(128, 128, 0, 4, 4)),
    "8x64_tail": (8, Sm90Tile(64, 128, 0, 4, 4, tail_split=4)),
    "8x128_tail": (8, Sm90Tile(128, 128, 0, 4, 3, tail_split=2)),
    "16x128": (16, Sm90Tile(128, 128, 0, 4, 3)),
    "16x128_8warps": (16, Sm90Tile(128, 128, 0, 8, 4)),
    "32x256": (32, Sm90Tile(256, 128, 0, 8, 3)),
    "16x128_split": (16, Sm90Tile(128, 128, 0, 8, 3, split_k=4)),
    "32x64_split": (32, Sm90Tile(64, 128, 0, 4, 4, split_k=2)),
    "64x64_split": (64, Sm90Tile(64, 128, 0, 4, 3, split_k=4)),
    "64x128_grouped": (64, Sm90Tile(128, 128, 2, 8, 3)),
    "128x128_split": (128, Sm90Tile(128, 128, 0, 8, 3, split_k=4)),
    "128x256": (128, Sm90Tile(256, 128, 2, 8, 2)),
    "48x192_persistent": (48, Sm90PersistentTile(192, 128, 0, 4, 3, parts=1)),
    "64x192_persistent": (64, Sm90PersistentTile(192, 128, 0, 4, 2)),
    "144x192_persistent": (144, Sm90PersistentTile(192, 128, 2, 4, 2, parts=4)),
    "64x192_persistent_head": (64, Sm90PersistentTile(192, 128, 0, 4, 5, parts=1, head=32)),
    "128x192_persistent_head": (128, Sm90PersistentTile(192, 128, 2, 4, 3, parts=1, head=64)),
    "192x192_persistent": (192, Sm90PersistentTile(192, 128, 1, 4, 3)),
    "96x128_two_consumers": (96, Sm90PersistentTile(128, 128, 1, 4, 3, parts=1)),
    "80x128_persistent": (80, Sm90PersistentTile(128, 64, 0, 4, 5, parts=4)),
    "256x128_persistent": (256, Sm90PersistentTile(128, 64, 2, 4, 5)),
    "288x128_persistent": (288, Sm90PersistentTile(128, 64, 2, 4, 5)),
    "320x128_persistent": (320, Sm90PersistentTile(128, 64, 1, 4, 4)),
}

# persistent tiles read MXFP8 only, and have blocks of their own: the same sum comes from this
IN_MEMORY = TILES["16x128"]


def random_mxfp8(device, rows: int, columns: int, seed: int) -> MXFP8:
    """Weights of about unit variance per output; every code but NaN, some scale bytes of 0 and zero blocks."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 127, (LOCAL, rows, columns), generator=g, dtype=torch.uint8)
    codes |= torch.randint(0, 2, codes.shape, generator=g, dtype=torch.uint8) * 128
    scales = torch.randint(112, 116, (LOCAL, rows, columns // 32), generator=g, dtype=torch.uint8)
    scales[:, ::7, 0] = 0
    codes[:, 3, :32] = 0
    return MXFP8(codes.view(torch.float8_e4m3fn).to(device), scales.to(device))


def clone(weights: MXFP8) -> MXFP8:
    return MXFP8(weights.values.clone(), weights.scales.clone())


def slots_on(device) -> torch.Tensor:
    """An expert map whose first experts are the local ones."""
    return first_experts(EXPERTS, LOCAL, device)


def table_of(ids, slots, block_m: int, tile, hidden: int, intermediate: int) -> RouteTable:
    """The routes cut for a tile of both stages, with the counters that it needs."""
    per_block = LayerTiles(block_m, tile, tile).arrivals(hidden, intermediate)
    return routed(ids, slots, LOCAL, block_m, arrivals_per_block=per_block)


def local_routes(ids: torch.Tensor) -> torch.Tensor:
    """Indices of the routes of `slots_on`'s local experts."""
    return ((ids >= 0) & (ids < LOCAL)).reshape(-1).nonzero().squeeze(1)


def table_and_rows(
    device, routing: str, tokens: int, block_m: int, tile, hidden: int, intermediate: int
) -> tuple[RouteTable, torch.Tensor]:
    """The table of a routing, and which rows are of local routes."""
    ids = topk_ids_for(routing, tokens, EXPERTS, LOCAL, TOP_K).to(device)
    return table_of(ids, slots_on(device), block_m, tile, hidden, intermediate), local_routes(ids)


def tiny_and_large(device, rows: int, columns: int) -> torch.Tensor:
    """BF16 rows: of each three one near the largest numbers, one near the smallest."""
    y = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    y[0::3] *= 1e35
    y[1::3] *= 1e-35
    return y


def poisoned(rows: int, columns: int, device) -> torch.Tensor:
    return torch.full((rows, columns), float("nan"), dtype=torch.bfloat16, device=device)


@pytest.mark.parametrize("name", ["8x64_tail", "8x128_tail"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_tails_after_full_waves(device, monkeypatch, routing, name):
    """Here a wave is 7 programs, so that small layers have full ones."""
    monkeypatch.setattr(sm90_launch, "compute_units", lambda device: 7)
    monkeypatch.setattr(sm90_launch, "resident", lambda tile, block_m: 1)
    test_both_gemms(device, 37, 256, 384, routing, name)


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "hidden", "intermediate"), [(37, 256, 384), (300, 512, 256), (1, 256, 256)])
def test_both_gemms(device, tokens, hidden, intermediate, routing, name):
    block_m, tile = TILES[name]
    ids = topk_ids_for(routing, tokens, EXPERTS, LOCAL, TOP_K).to(device)
    slots = slots_on(device)
    routes = table_of(ids, slots, block_m, tile, hidden, intermediate)
    routes_in_memory, tile_in_memory = routes, tile
    if isinstance(tile, Sm90PersistentTile):
        routes_in_memory, tile_in_memory = routed(ids, slots, LOCAL, IN_MEMORY[0]), IN_MEMORY[1]
    rows = local_routes(ids)
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=g).to(device, torch.bfloat16)
    topk_weights = torch.rand(tokens, TOP_K, generator=g).to(device)

    w13 = random_mxfp8(device, 2 * intermediate, hidden, 1)
    y = poisoned(tokens * TOP_K, intermediate, device)
    launch(y, "gate_up", x, pack(clone(w13), RowOrder.GATE_UP), routes, tile)
    want = gate_up_reference.gate_up(x, w13, routes, TOP_K, ACTIVATION, torch.float64)
    check_rows(y, want, rows, SNR_FLOOR[torch.bfloat16])
    in_memory = poisoned(tokens * TOP_K, intermediate, device)
    launch(in_memory, "gate_up", x, w13.dequantize(), routes_in_memory, tile_in_memory)
    torch.testing.assert_close(y, in_memory, rtol=0, atol=0, equal_nan=True)

    w2 = random_mxfp8(device, hidden, intermediate, 2)
    out = poisoned(tokens * TOP_K, hidden, device)
    launch(out, "down", y, pack(clone(w2), RowOrder.PLAIN), routes, tile, topk_weights)
    want = down_reference.down(y.double(), w2, routes, topk_weights, torch.float64)
    check_rows(out, want, rows, SNR_FLOOR[torch.bfloat16])
    in_memory = poisoned(tokens * TOP_K, hidden, device)
    launch(in_memory, "down", y, w2.dequantize(), routes_in_memory, tile_in_memory, topk_weights)
    torch.testing.assert_close(out, in_memory, rtol=0, atol=0, equal_nan=True)


def launch(out, stage, rows, weights, routes, tile, topk_weights=None):
    """One stage, with rows and results by route; persistent tiles have theirs packed in the table's order."""
    if topk_weights is None:
        topk_weights = torch.ones(routes.num_routes // TOP_K, TOP_K, device=rows.device)
    if routes.arrivals is not None:
        routes.arrivals.zero_()
    torch.cuda.synchronize()  # weights and counters must be older than the kernel before
    if not isinstance(tile, Sm90PersistentTile):
        if stage == "gate_up":
            launch_gate_up_sm90(rows, weights, routes, TOP_K, ACTIVATION, tile, out)
        else:
            launch_down_sm90(rows, weights, routes, topk_weights, tile, out)
        return
    order = packed_routes(routes)
    result = torch.full_like(out, float("nan"))
    if stage == "gate_up":
        x = launch_gather(rows, routes, TOP_K, torch.full_like(rows, float("nan")).repeat(TOP_K, 1))
        nothing = torch.full_like(x, float("nan"))
        launch_gate_up_down(x, weights, None, routes, topk_weights, ACTIVATION, tile, result, nothing)
    else:
        y = torch.full_like(rows, float("nan"))
        y[: order.numel()] = rows[order]
        nothing = torch.full_like(out, float("nan"))
        launch_gate_up_down(nothing, None, weights, routes, topk_weights, ACTIVATION, tile, y, result)
    assert nothing.isnan().all()
    assert result[order.numel() :].isnan().all()  # what is past the rows is not written
    out[order] = result[: order.numel()]


@pytest.mark.parametrize("name", [name for name in TILES if "persistent" in name])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "hidden", "intermediate"), [(37, 256, 384), (300, 512, 256), (2000, 640, 320)])
def test_both_gemms_in_one_launch(device, tokens, hidden, intermediate, routing, name):
    """Bit for bit one stage after the other, twice, in the memory of the gathered rows; lone rows where they belong."""
    block_m, tile = TILES[name]
    ids = topk_ids_for(routing, tokens, EXPERTS, LOCAL, TOP_K).to(device)
    slots = slots_on(device)
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    topk_weights = torch.rand(tokens, TOP_K, device=device)
    w13 = pack(random_mxfp8(device, 2 * intermediate, hidden, 1), RowOrder.GATE_UP)
    w2 = pack(random_mxfp8(device, hidden, intermediate, 2), RowOrder.PLAIN)
    found = []
    for _ in range(3):
        routes = table_of(ids, slots, block_m, tile, hidden, intermediate)
        final = poisoned(tokens, hidden, device)
        lone = LoneTokens(ids, slots, LOCAL, slots.new_empty(tokens * TOP_K), final, stored=True)
        rows = launch_gather(x, routes, TOP_K, poisoned(tokens * TOP_K, hidden, device), lone=lone)
        y = poisoned(tokens * TOP_K, intermediate, device)
        if not found:
            found.append(poisoned(tokens * TOP_K, hidden, device))
            launch_gate_up_down(rows, w13, None, routes, topk_weights, ACTIVATION, tile, y, found[0])
            assert found[0].isnan().all()
            routes.arrivals.zero_()
            torch.cuda.synchronize()  # or the kernel would count before it has waited for this
            launch_gate_up_down(rows, None, w2, routes, topk_weights, ACTIVATION, tile, y, found[0])
        else:
            launch_gate_up_down(rows, w13, w2, routes, topk_weights, ACTIVATION, tile, y, rows, lone)
            found.append(rows)
            of_row = lone.of_row[: sum(group.numel() for _, group in routes.groups())].long()
            alone = (of_row >= 0).nonzero().squeeze(1)
            found[-1][alone] = final[of_row[alone]]
            final[of_row[alone]] = float("nan")
            assert final.isnan().all()
    count = sum(group.numel() for _, group in routes.groups())
    for other in found[1:]:
        torch.testing.assert_close(other[:count], found[0][:count], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["128x192_persistent_head", "288x128_persistent", "320x128_persistent"])
@pytest.mark.parametrize(
    "counts", [(1, 32, 33, 64, 65), (80, 81, 96, 97, 129), (256, 257, 272, 273, 288), (0, 289, 305, 321, 545)]
)
def test_every_number_of_columns(device, counts, name):
    """The rows of an expert fill a large block to any degree: bit for bit what blocks of 48 make."""
    hidden, intermediate = 512, 384
    flat = torch.repeat_interleave(torch.arange(LOCAL), torch.tensor(counts))
    tokens = flat.numel() // 2 + 1
    ids = torch.full((tokens * TOP_K,), EXPERTS - 1)
    ids[torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(1))[: flat.numel()]] = flat
    ids = ids.view(tokens, TOP_K).int().to(device)
    slots = slots_on(device)
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    topk_weights = torch.rand(tokens, TOP_K, device=device)
    w13 = pack(random_mxfp8(device, 2 * intermediate, hidden, 1), RowOrder.GATE_UP)
    w2 = pack(random_mxfp8(device, hidden, intermediate, 2), RowOrder.PLAIN)
    found = []
    for block_m, tile in (TILES["48x192_persistent"], TILES[name]):
        routes = table_of(ids, slots, block_m, tile, hidden, intermediate)
        rows = launch_gather(x, routes, TOP_K, poisoned(tokens * TOP_K, hidden, device))
        y = poisoned(tokens * TOP_K, intermediate, device)
        launch_gate_up_down(rows, w13, w2, routes, topk_weights, ACTIVATION, tile, y, rows)
        found.append(rows)
    torch.testing.assert_close(found[1][: sum(counts)], found[0][: sum(counts)], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["16x128", "48x192_persistent"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(288, 160), (2880, 96)])
def test_sizes_that_are_no_whole_tiles(device, hidden, intermediate, name):
    """Rows that are no multiple of 64 and columns that are no multiple of 128: padded when packed."""
    tokens, (block_m, tile) = 20, TILES[name]
    routes, rows = table_and_rows(device, "uniform", tokens, block_m, tile, hidden, intermediate)
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    w13, w2 = random_mxfp8(device, 2 * intermediate, hidden, 1), random_mxfp8(device, hidden, intermediate, 2)
    y, out = poisoned(tokens * TOP_K, intermediate, device), poisoned(tokens * TOP_K, hidden, device)
    launch(y, "gate_up", x, pack(clone(w13), RowOrder.GATE_UP), routes, tile)
    want = gate_up_reference.gate_up(x, w13, routes, TOP_K, ACTIVATION, torch.float64)
    check_rows(y, want, rows, SNR_FLOOR[torch.bfloat16])
    topk_weights = torch.rand(tokens, TOP_K, device=device)
    launch(out, "down", y, pack(clone(w2), RowOrder.PLAIN), routes, tile, topk_weights)
    want = down_reference.down(y.double(), w2, routes, topk_weights, torch.float64)
    check_rows(out, want, rows, SNR_FLOOR[torch.bfloat16])
