"""The portable kernels on MXFP8 weights: bit for bit what they give on the same weights in BF16."""

from __future__ import annotations

import pytest
import torch

from epfuse import ExpertWeights, SwiGLUOAI
from epfuse.stages.down.launch import launch_down
from epfuse.stages.gate_up.launch import launch_gate_up
from epfuse.stages.route import reference as route_reference
from epfuse.stages.tiles import GemmTile
from epfuse.verify.suite import poisoned_memory, same_bits
from tests.cases import ROUTINGS, make_case

ACTIVATION = SwiGLUOAI()
TILE = GemmTile(block_n=64, block_k=64, group_m=0, num_warps=4, num_stages=2)


@pytest.mark.parametrize("values", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=["fn", "fnuz"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_same_bits_as_bf16(device: torch.device, routing: str, values: torch.dtype) -> None:
    if device.type == "cuda" and values == torch.float8_e4m3fnuz and torch.version.hip is None:
        pytest.skip("not this GPU's E4M3")
    case = make_case(device, tokens=21, hidden=160, intermediate=96, routing=routing, scale=4.0)
    stacks = ExpertWeights.quantize(case.weights).mxfp8_experts
    for stack in (stacks.w13, stacks.w2):
        stack.values[:, 1, :32] = 0.0
        stack.scales[:, ::3, 1] = 3  # the least that BF16 holds with every code
    routes = route_reference.route(case.topk_ids, case.expert_map.on(device), case.weights.local_experts, 16)
    results = []
    for convert in (
        lambda w: w.dequantize(torch.bfloat16),
        lambda w: w.to_fnuz_() if "fnuz" in str(values) else w,  # the last use of w
    ):
        with poisoned_memory():
            y, out = (case.hidden.new_empty(routes.num_routes, width) for width in (96, 160))
            launch_gate_up(case.hidden, convert(stacks.w13), routes, 4, ACTIVATION, TILE, y)
            launch_down(y, convert(stacks.w2), routes, case.topk_weights, TILE, out)
            results.append((y, out))
    for dense, packed in zip(*results, strict=True):
        assert same_bits(dense, packed)
