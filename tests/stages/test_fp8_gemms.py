"""The grouped GEMMs with FP8 rows against float64 on the same quantised numbers, with poisoned outputs."""

from __future__ import annotations

import pytest
import torch

from epfuse import Target
from epfuse.config import Combine
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.stages.down.launch_fp8 import launch_down_fp8
from epfuse.stages.gate_up.launch_fp8 import launch_gate_up_fp8
from epfuse.stages.quantize.reference import quantize
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.route import reference as route_reference
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import GemmTile
from epfuse.weights.block_fp8 import BlockFP8, BlockScale
from epfuse.weights.projections import expert_matrix
from tests.cases import ROUTINGS, Case, make_case, snr_db

TILES = {
    "one_group": GemmTile(block_n=64, block_k=32, group_m=0, num_warps=4, num_stages=2),
    "four_groups": GemmTile(block_n=32, block_k=128, group_m=2, num_warps=4, num_stages=2),
}
# On exact operands only the rounding to BF16 is left: 2^-8 relative, uniform, is 52.9 dB at worst, less what few values
# scatter (an expert may have one row, and the largest columns dominate its norm); no value off by more makes it 48.2.
ROUNDED = 51.0
EXACT = 120.0
FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz


@pytest.fixture(params=[FN, FNUZ], ids=["fn", "fnuz"])
def values_dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    if device.type == "cuda" and (request.param is FNUZ) != (torch.version.hip is not None):
        pytest.skip("not this GPU's E4M3")
    return request.param


def stack_of(dense: torch.Tensor, group: int, dtype: torch.dtype) -> MXFP8 | BlockFP8:
    """Weights with corners: a block of zeros, blocks whose scale byte is 0, scales that differ from row to row."""
    dense = dense.float() * torch.logspace(-1, 1, dense.shape[1], device=dense.device)[:, None]
    dense[:, 1, :32] = 0
    packed = MXFP8.quantize(dense)
    packed.scales[:, ::3, 1] = 0
    if group == 128:
        blocks = BlockFP8.quantize(packed, BlockScale.AMAX)
        return blocks.to_fnuz_() if dtype is FNUZ else blocks
    return packed.to_fnuz_() if dtype is FNUZ else packed


def numbers(stack: MXFP8 | BlockFP8, expert: int) -> torch.Tensor:
    return expert_matrix(stack, expert, torch.float64)


def routes_of(case: Case) -> RouteTable:
    return route_reference.route(
        case.topk_ids, case.expert_map.on(case.hidden.device), case.weights.local_experts, block_m=16
    )


def check_rows(out: torch.Tensor, want: torch.Tensor, routes: RouteTable, floor: float) -> None:
    """Local rows are right, remote rows untouched."""
    remote = torch.ones(out.shape[0], dtype=torch.bool, device=out.device)
    for _, rows in routes.groups():
        assert snr_db(out[rows], want[rows]) > floor
        remote[rows] = False
    assert out[remote].isnan().all()


def expected_gate_up(x: FP8Rows, stack: MXFP8 | BlockFP8, routes: RouteTable) -> torch.Tensor:
    exact = x.dequantize(torch.float64)
    want = torch.zeros(routes.num_routes, stack.shape[1], dtype=torch.float64, device=exact.device)
    for expert, rows in routes.groups():
        want[rows] = exact[rows // 4] @ numbers(stack, expert).T
    return want


def expected_down(y: FP8Rows, stack: MXFP8 | BlockFP8, routes: RouteTable, weights: torch.Tensor) -> torch.Tensor:
    exact = y.dequantize(torch.float64)
    want = torch.zeros(routes.num_routes, stack.shape[1], dtype=torch.float64, device=exact.device)
    for expert, rows in routes.groups():
        want[rows] = exact[rows] @ numbers(stack, expert).T * weights.view(-1)[rows, None].double()
    return want


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_gate_up(device: torch.device, routing: str, group: int, values_dtype: torch.dtype) -> None:
    case = make_case(device, tokens=21, hidden=160, intermediate=96, routing=routing, scale=4.0)
    routes = routes_of(case)
    stack = stack_of(case.weights.dense_experts.w13, group, values_dtype)
    x = quantize(case.hidden, group, dtype=values_dtype)
    out = torch.full((routes.num_routes, 192), torch.nan, dtype=torch.bfloat16, device=device)
    assert launch_gate_up_fp8(x, stack, routes, 4, TILES["four_groups"], out=out) is out
    check_rows(out, expected_gate_up(x, stack, routes), routes, ROUNDED)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_down(device: torch.device, routing: str, group: int, values_dtype: torch.dtype) -> None:
    case = make_case(device, tokens=21, hidden=160, intermediate=96, routing=routing)
    routes = routes_of(case)
    stack = stack_of(case.weights.dense_experts.w2, group, values_dtype)
    y = remote_poisoned(torch.randn(routes.num_routes, 96, device=device), routes, group, values_dtype)
    out = torch.full((routes.num_routes, 160), torch.nan, dtype=torch.bfloat16, device=device)
    launch_down_fp8(y, stack, routes, case.topk_weights, TILES["four_groups"], Combine.DETERMINISTIC, out)
    check_rows(out, expected_down(y, stack, routes, case.topk_weights), routes, ROUNDED)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_down_into_tokens_by_atomics(device: torch.device, routing: str, group: int) -> None:
    case = make_case(device, tokens=21, hidden=160, intermediate=96, routing=routing)
    routes = routes_of(case)
    dtype = FNUZ if torch.version.hip else FN
    stack = stack_of(case.weights.dense_experts.w2, group, dtype)
    y = remote_poisoned(torch.randn(routes.num_routes, 96, device=device), routes, group, dtype)
    total = torch.zeros(21, 160, device=device)
    launch_down_fp8(y, stack, routes, case.topk_weights, TILES["four_groups"], Combine.ATOMIC, total)
    want = expected_down(y, stack, routes, case.topk_weights).view(21, 4, 160).sum(1)
    assert not total[want.abs().sum(1) == 0].any()
    assert snr_db(total, want) > EXACT or routing == "nothing_local"


def remote_poisoned(x: torch.Tensor, routes: RouteTable, group: int, dtype: torch.dtype) -> FP8Rows:
    """Quantised rows, those of remote routes NaN."""
    remote = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    for _, rows in routes.groups():
        remote[rows] = False
    return quantize(x.masked_fill(remote[:, None], torch.nan), group, dtype=dtype)


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES.keys())
def test_the_tile_does_not_change_the_sum_within_a_group(device: torch.device, tile: GemmTile) -> None:
    case = make_case(device, tokens=5, hidden=96, intermediate=64)
    routes = routes_of(case)
    dtype = FNUZ if torch.version.hip else FN
    stack, x = stack_of(case.weights.dense_experts.w13, 32, dtype), quantize(case.hidden, dtype=dtype)
    out = torch.empty(routes.num_routes, stack.shape[1], device=device)
    launch_gate_up_fp8(x, stack, routes, 4, tile, out)
    want = expected_gate_up(x, stack, routes)
    for _, rows in routes.groups():
        assert snr_db(out[rows], want[rows]) > EXACT


def test_nan_in_a_scale_reaches_what_it_scales(device: torch.device) -> None:
    case = make_case(device, tokens=5, hidden=64, intermediate=32, routing="one_expert")
    routes = routes_of(case)
    dtype = FNUZ if torch.version.hip else FN
    stack, x = stack_of(case.weights.dense_experts.w13, 32, dtype), quantize(case.hidden, dtype=dtype)
    stack.scales[:, 7, 1] = 255
    x.scales[2, 0] = 255
    out = case.hidden.new_empty(routes.num_routes, stack.shape[1])
    launch_gate_up_fp8(x, stack, routes, 4, TILES["one_group"], out)
    rows = next(rows for _, rows in routes.groups())
    expected = torch.zeros(rows.numel(), 64, dtype=torch.bool, device=device)
    expected[:, 7] = True
    expected[rows // 4 == 2] = True
    assert torch.equal(out[rows].isnan(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_minimax_m3_tiles(device: torch.device, group: int, block_m: int) -> None:
    from epfuse.families.portable_fp8 import FP8_TILES
    from epfuse.target import target_of

    target = target_of(device)
    found = [entry.tiles for entry in FP8_TILES[target] if entry.tiles.block_m == block_m]
    if not found:
        pytest.skip("no tile of this target has so many rows")
    dtype = FNUZ if target is Target.GFX942 else FN
    case = make_case(device, tokens=300, hidden=6144, intermediate=512, experts=16, local=4)
    routes = route_reference.route(case.topk_ids, case.expert_map.on(device), 4, block_m)
    stack = stack_of(case.weights.dense_experts.w13, group, dtype)
    x = quantize(case.hidden, group, dtype=dtype)
    out = torch.full((routes.num_routes, 1024), torch.nan, dtype=torch.bfloat16, device=device)
    launch_gate_up_fp8(x, stack, routes, 4, found[0].gate_up, out=out)
    check_rows(out, expected_gate_up(x, stack, routes), routes, ROUNDED)
