"""gate_up, down and combine kernels against their references, with poisoned outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from epfuse import SwiGLUOAI
from epfuse.stages.combine import reference as combine_reference
from epfuse.stages.combine.launch import launch_combine
from epfuse.stages.down import reference as down_reference
from epfuse.stages.down.launch import launch_down
from epfuse.stages.gate_up import reference as gate_up_reference
from epfuse.stages.gate_up.launch import launch_gate_up
from epfuse.stages.route import reference as route_reference
from epfuse.stages.tiles import GemmTile
from tests.cases import ROUTINGS, make_case, snr_db

TILE = GemmTile(block_n=32, block_k=32, group_m=0, num_warps=4, num_stages=2)
GROUPED = GemmTile(block_n=16, block_k=16, group_m=2, num_warps=4, num_stages=2)
ACTIVATION = SwiGLUOAI()

# 16-bit: one rounding of the accumulators (2^-9 relative, uniform) and one of the result; measured 50 to 54 dB.
SNR_FLOOR = {torch.bfloat16: 47.0, torch.float16: 65.0, torch.float32: 120.0}


def poisoned(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((rows, columns), float("nan"), dtype=like.dtype, device=like.device)


def routes_of(case, block_m=16):
    return route_reference.route(
        case.topk_ids, case.expert_map.on(case.hidden.device), case.weights.local_experts, block_m
    )


def local_rows(case) -> torch.Tensor:
    slots = route_reference.local_experts(case.topk_ids, case.expert_map.on(case.hidden.device))
    return (slots >= 0).nonzero().squeeze(1)


def check_rows(out: torch.Tensor, want: torch.Tensor, rows: torch.Tensor, floor: float) -> None:
    """Local rows are right, remote rows are untouched."""
    if rows.numel():
        assert snr_db(out[rows], want[rows]) > floor
    remote = torch.ones(out.shape[0], dtype=torch.bool, device=out.device)
    remote[rows] = False
    assert out[remote].isnan().all()


@pytest.mark.parametrize("tile", [TILE, GROUPED], ids=["all_rows", "grouped"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_gate_up(device, routing, tile):
    case = make_case(device, routing=routing, scale=4.0)
    routes = routes_of(case)
    dense = case.weights.dense_experts
    out = poisoned(routes.num_routes, case.weights.intermediate, case.hidden)
    launch_gate_up(case.hidden, dense.w13, routes, 4, ACTIVATION, tile, out)
    want = gate_up_reference.gate_up(case.hidden, dense.w13, routes, 4, ACTIVATION, torch.float64)
    check_rows(out, want, local_rows(case), SNR_FLOOR[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 48), (72, 40), (33, 17)])
def test_odd_shapes(device, dtype, hidden, intermediate):
    case = make_case(device, tokens=9, hidden=hidden, intermediate=intermediate, dtype=dtype)
    routes = routes_of(case)
    dense = case.weights.dense_experts
    y = poisoned(routes.num_routes, intermediate, case.hidden)
    launch_gate_up(case.hidden, dense.w13, routes, 4, ACTIVATION, TILE, y)
    want = gate_up_reference.gate_up(case.hidden, dense.w13, routes, 4, ACTIVATION, torch.float64)
    check_rows(y, want, local_rows(case), SNR_FLOOR[dtype])
    out = poisoned(routes.num_routes, hidden, case.hidden)
    launch_down(y, dense.w2, routes, case.topk_weights, TILE, out)
    want = down_reference.down(y.double(), dense.w2, routes, case.topk_weights, torch.float64)
    check_rows(out, want, local_rows(case), SNR_FLOOR[dtype])


@pytest.mark.parametrize("routing", ROUTINGS)
def test_down(device, routing):
    case = make_case(device, routing=routing)
    routes = routes_of(case)
    dense = case.weights.dense_experts
    rows = local_rows(case)
    y = poisoned(routes.num_routes, case.weights.intermediate, case.hidden)
    y[rows] = torch.randn(rows.numel(), y.shape[1], generator=torch.Generator().manual_seed(3)).to(y)
    out = poisoned(routes.num_routes, case.weights.hidden, case.hidden)
    launch_down(y, dense.w2, routes, case.topk_weights, TILE, out)
    want = down_reference.down(y.double(), dense.w2, routes, case.topk_weights, torch.float64)
    check_rows(out, want, rows, SNR_FLOOR[torch.bfloat16])


@pytest.mark.parametrize("out_is_free", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_combine_is_bitwise_the_reference(device, routing, packed, out_is_free):
    case = make_case(device, routing=routing, hidden=72)
    rows = local_rows(case)
    routed = poisoned(case.topk_ids.numel(), 72, case.hidden)
    routed[rows] = torch.randn(rows.numel(), 72, generator=torch.Generator().manual_seed(3)).to(routed)
    slots = case.expert_map.on(device)
    out = poisoned(case.hidden.shape[0], 72, case.hidden)
    given, route_row = routed, None
    if packed:
        order = torch.cat([found for _, found in routes_of(case).groups()] or [rows[:0]])
        route_row = torch.full((case.topk_ids.numel(),), -1, dtype=torch.int32, device=device)
        route_row[order] = torch.arange(order.numel(), dtype=torch.int32, device=device)
        given = poisoned(case.topk_ids.numel(), 72, case.hidden)
        given[: order.numel()] = routed[order]
    if device.type == "cuda":
        torch.cuda.synchronize()  # zeros are written before the kernel before has finished: out's NaN must be there
    local = case.weights.local_experts
    launch_combine(given, case.topk_ids, slots, local, out, route_row, out_is_free)
    want = combine_reference.combine(routed, case.topk_ids, slots, out.dtype)
    if packed and out_is_free:  # rows of tokens with one local route are there already: they are left as they are
        lone = torch.bincount(rows // case.topk_ids.shape[1], minlength=out.shape[0]) == 1
        assert out[lone].isnan().all()
        out, want = out[~lone], want[~lone]
    torch.testing.assert_close(out, want, rtol=0, atol=0)


def test_fused_is_bitwise_the_unfused(device):
    """One GEMM to [R, 2I], rounded, then the activation: the same bits as the fused epilogue."""
    case = make_case(device, tokens=21, scale=6.0)
    routes, rows = routes_of(case), local_rows(case)
    dense = case.weights.dense_experts
    per_route = case.hidden.repeat_interleave(4, 0)
    fused, plain = (per_route.new_empty(per_route.shape[0], width) for width in (dense.w2.shape[2], dense.w13.shape[1]))
    launch_gate_up(case.hidden, dense.w13, routes, 4, ACTIVATION, TILE, fused)
    launch_down(per_route, dense.w13, routes, torch.ones_like(case.topk_weights), TILE, plain)
    if device.type == "cpu":
        gate, up = plain.float().numpy()[rows].reshape(rows.numel(), 2, -1).swapaxes(0, 1)
        limit = np.float32(ACTIVATION.limit)
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        alpha, beta = np.float32(ACTIVATION.alpha), np.float32(ACTIVATION.beta)
        want = torch.from_numpy(gate * (1 / (1 + np.exp(-(alpha * gate)))) * (up + beta)).to(fused.dtype)
    else:
        want = gpu_activation(plain)[rows]
    torch.testing.assert_close(fused[rows], want, rtol=0, atol=0)


def gpu_activation(gate_up: torch.Tensor) -> torch.Tensor:
    """The activation as a launch of its own, on the device."""
    from tests.activation_kernel import activation_kernel

    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    activation_kernel[(rows,)](
        gate_up, out, width, ACTIVATION.parameters, ACTIVATION.kind, BLOCK=1 << (width - 1).bit_length()
    )
    return out


def test_nan_is_not_clamped_away(device):
    case = make_case(device, tokens=5, routing="one_expert")
    case.hidden[2] = float("nan")
    routes = routes_of(case)
    y = case.hidden.new_empty(routes.num_routes, case.weights.intermediate)
    launch_gate_up(case.hidden, case.weights.dense_experts.w13, routes, 4, ACTIVATION, TILE, y)
    rows = local_rows(case)
    assert y[rows[rows // 4 == 2]].isnan().all()
    assert not y[rows[rows // 4 != 2]].isnan().any()
