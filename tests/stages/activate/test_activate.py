"""SwiGLU and quantisation in one kernel: the bits of the two as kernels of their own, local rows only."""

from __future__ import annotations

import pytest
import torch

from epfuse import SwiGLUOAI
from epfuse.numerics.e8m0 import ScaleRounding
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.stages.activate.launch import launch_activate
from epfuse.stages.activate.reference import activate
from epfuse.stages.activation_reference import swiglu_oai
from epfuse.stages.quantize.launch import launch_quantize
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.route import reference as route_reference
from epfuse.stages.route.table import RouteTable
from tests.activation_kernel import activation_kernel
from tests.cases import ROUTINGS, make_case, snr_db

ACTIVATION = SwiGLUOAI()
SENTINEL = 0x55


def untouched(rows: int, columns: int, group: int, dtype: torch.dtype, device: torch.device) -> FP8Rows:
    """An output in which a byte that is not written shows."""
    out = FP8Rows.empty(rows, columns, group, dtype, device)
    out.values.view(torch.uint8).fill_(SENTINEL)
    out.scales.fill_(SENTINEL)
    return out


def local_mask(routes: RouteTable) -> torch.Tensor:
    local = torch.zeros(routes.num_routes, dtype=torch.bool, device=routes.sorted_routes.device)
    for _, rows in routes.groups():
        local[rows] = True
    return local


def gate_up_of(routes: RouteTable, intermediate: int, device: torch.device) -> torch.Tensor:
    """``[R, 2I]`` that the clamp bites; rows of remote routes are NaN, and one local block of gates is zeros."""
    g = torch.Generator().manual_seed(5)
    x = (6 * torch.randn(routes.num_routes, 2 * intermediate, generator=g)).to(device, torch.bfloat16)
    x[:, :32] = 0
    return x.masked_fill(~local_mask(routes)[:, None], torch.nan)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=["fn", "fnuz"])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_same_bits_as_unfused_and_remote_rows_untouched(
    device: torch.device, routing: str, group: int, dtype: torch.dtype
) -> None:
    case = make_case(device, tokens=13, routing=routing)
    routes = route_reference.route(case.topk_ids, case.expert_map.on(device), 4, block_m=16)
    gate_up = gate_up_of(routes, 96, device)
    out = untouched(routes.num_routes, 96, group, dtype, device)
    assert launch_activate(gate_up, routes, ACTIVATION, out) is out
    local = local_mask(routes)
    assert (out.values.view(torch.uint8)[~local] == SENTINEL).all()
    assert (out.scales[~local] == SENTINEL).all()
    y = torch.empty(routes.num_routes, 96, device=device)
    activation_kernel[(routes.num_routes,)](gate_up, y, 96, ACTIVATION.parameters, ACTIVATION.kind, BLOCK=128)
    unfused = launch_quantize(y, group, dtype=dtype)
    assert torch.equal(out.values.view(torch.uint8)[local], unfused.values.view(torch.uint8)[local])
    assert torch.equal(out.scales[local], unfused.scales[local])


def test_the_reference_holds_the_same_numbers(device: torch.device) -> None:
    case = make_case(device, tokens=9, experts=4, local=4)
    routes = route_reference.route(case.topk_ids, case.expert_map.on(device), 4, block_m=16)
    gate_up = gate_up_of(routes, 96, device)
    out = untouched(routes.num_routes, 96, 32, torch.float8_e4m3fn, device)
    ours = launch_activate(gate_up, routes, ACTIVATION, out).dequantize(torch.float64)
    theirs = activate(gate_up, ACTIVATION).dequantize(torch.float64)
    assert snr_db(ours, theirs) > 60  # a last bit of the sigmoid may move a number over a rounding boundary


def test_nan_spoils_its_own_group_only(device: torch.device) -> None:
    case = make_case(device, tokens=3, experts=4, local=4)
    routes = route_reference.route(case.topk_ids, case.expert_map.on(device), 4, block_m=16)
    gate_up = torch.ones(routes.num_routes, 192, dtype=torch.bfloat16, device=device)
    gate_up[4, 40] = torch.nan
    expected = torch.zeros(routes.num_routes, 96, dtype=torch.bool, device=device)
    expected[4, 32:64] = True
    out = FP8Rows.empty(routes.num_routes, 96, 32, torch.float8_e4m3fn, device)
    assert torch.equal(launch_activate(gate_up, routes, ACTIVATION, out).dequantize().isnan(), expected)


def test_the_ceil_rule_loses_less_than_the_floor_rule() -> None:
    """Why activations are quantised with CEIL: under FLOOR the largest values of a block saturate."""
    g = torch.Generator().manual_seed(0)
    hidden, intermediate = 1024, 512
    w13 = MXFP8.quantize(torch.randn(2 * intermediate, hidden, generator=g) / hidden**0.5).dequantize(torch.float32)
    w2 = MXFP8.quantize(torch.randn(hidden, intermediate, generator=g) / intermediate**0.5).dequantize(torch.float32)
    x = torch.randn(64, hidden, generator=g).bfloat16().float()
    want = swiglu_oai(x @ w13.T, ACTIVATION) @ w2.T
    error = {}
    for rounding in ScaleRounding:
        gate_up = (MXFP8.quantize(x, rounding).dequantize(torch.float32) @ w13.T).bfloat16()
        y = MXFP8.quantize(swiglu_oai(gate_up.float(), ACTIVATION), rounding).dequantize(torch.float32)
        got = y @ w2.T
        error[rounding] = float((got - want).norm() / want.norm())
    assert error[ScaleRounding.CEIL] < 0.045 < error[ScaleRounding.FLOOR]
