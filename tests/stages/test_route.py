"""The routing kernels against the reference."""

from __future__ import annotations

import pytest
import torch

from epfuse.stages.route import reference
from epfuse.stages.route.launch import route_tiles
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import RouteTiles
from epfuse.target import Target
from tests.cases import ROUTINGS, routed, topk_ids_for

ONE_LAUNCH = RouteTiles(count=64)
TWO_LAUNCHES = RouteTiles(one_launch_routes=0, chunk=16)
LONG_CHUNKS = RouteTiles(one_launch_routes=0, chunk=512)


def local_map(experts: int, local: int, device: torch.device) -> torch.Tensor:
    slots = torch.full((experts,), -1, dtype=torch.int32)
    slots[:local] = torch.arange(local, dtype=torch.int32).flip(0)
    return slots.to(device)


def assert_same(got: RouteTable, want: RouteTable) -> None:
    used = int(want.num_padded)
    assert int(got.num_padded) == used
    assert got.max_padded == want.max_padded >= used
    torch.testing.assert_close(got.sorted_routes[:used].cpu(), want.sorted_routes[:used].cpu(), rtol=0, atol=0)
    blocks = used // want.block_m
    torch.testing.assert_close(got.block_expert[:blocks].cpu(), want.block_expert[:blocks].cpu(), rtol=0, atol=0)
    torch.testing.assert_close(got.block_row[:blocks].cpu(), want.block_row[:blocks].cpu(), rtol=0, atol=0)
    first = want.sorted_routes[:used].view(-1, want.block_m)
    rows = (first < want.num_routes).sum(1)
    assert want.block_row[:blocks].tolist() == (rows.cumsum(0) - rows).tolist()


@pytest.mark.parametrize(
    "tiles", [ONE_LAUNCH, TWO_LAUNCHES, LONG_CHUNKS], ids=["one_launch", "two_launches", "long_chunks"]
)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 3, 37, 300])
def test_matches_reference(device, routing, tokens, tiles):
    experts, local = 24, 5
    ids = topk_ids_for(routing, tokens, experts, local, top_k=4).to(device)
    slots = local_map(experts, local, device)
    for block_m in (16, 48, 64):
        assert_same(routed(ids, slots, local, block_m, tiles), reference.route(ids, slots, local, block_m))


@pytest.mark.parametrize("tiles", [ONE_LAUNCH, TWO_LAUNCHES], ids=["one_launch", "two_launches"])
def test_many_experts_and_int32_ids(device, tiles):
    ids = topk_ids_for("uniform", 50, 128, 127, top_k=8).int().to(device)
    slots = torch.arange(128, dtype=torch.int32, device=device)
    assert_same(routed(ids, slots, 128, 16, tiles), reference.route(ids, slots, 128, 16))


@pytest.mark.parametrize("tiles", [ONE_LAUNCH, TWO_LAUNCHES], ids=["one_launch", "two_launches"])
def test_ids_just_outside_the_experts_read_nothing_of_the_map(device, tiles):
    """Beside the map lie slots that are this rank's: an id of -1 or E that read them would get an expert."""
    experts, local = 24, 5
    around = torch.zeros(experts + 2, dtype=torch.int32, device=device)
    slots = around[1:-1]
    slots.copy_(local_map(experts, local, device))
    ids = torch.tensor([[-1, experts], [0, experts], [-1, 4], [experts, experts]], device=device)
    assert_same(
        routed(ids, slots, local, 16, tiles), reference.route(ids, local_map(experts, local, device), local, 16)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [256, 1024, 2048, 8192, 12287, 12288, 20000, 32768, 50000])
def test_many_tokens(device, tokens):
    """In chunks of 128, of 256 and of 512 routes."""
    ids = topk_ids_for("uniform", tokens, 128, 16, top_k=4).to(device)
    slots = local_map(128, 16, device)
    for block_m in (16, 64, 128, 144):
        assert_same(routed(ids, slots, 16, block_m), reference.route(ids, slots, 16, block_m))


@pytest.mark.parametrize(
    ("routes", "chunk"),
    [(1, 128), (32768, 128), (49151, 128), (49152, 256), (131071, 256), (131072, 512), (1 << 22, 512)],
)
def test_many_routes_are_cut_into_longer_chunks_on_hopper_alone(routes: int, chunk: int) -> None:
    assert route_tiles(routes, Target.SM90).chunk == chunk
    assert route_tiles(routes, Target.GFX942) == RouteTiles()
