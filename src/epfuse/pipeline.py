"""route -> gate_up -> down -> combine, each stage a named range in a profile."""

from __future__ import annotations

import torch
from torch.profiler import record_function

from epfuse.config import SwiGLUOAI, WeightFormat
from epfuse.expert_map import ExpertMap
from epfuse.operands import overlaps
from epfuse.scratch import Scratch, rows_in
from epfuse.stages.combine import reference as combine_reference
from epfuse.stages.down import reference as down_reference
from epfuse.stages.gate_up import reference as gate_up_reference
from epfuse.stages.route import reference as route_reference
from epfuse.stages.tiles import LayerTiles, Sm90PersistentTile
from epfuse.weights.block_fp8 import BlockFP8
from epfuse.weights.experts import ExpertWeights
from epfuse.weights.fragment import FragmentMXFP8
from epfuse.weights.row_fp8 import RowFP8


def run_reference(
    hidden: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: ExpertMap,
    activation: SwiGLUOAI,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The layer in plain PyTorch, on any device and weights of any format; syncs with the device.

    ``compute=torch.float64`` rounds nowhere and returns float64: the oracle of every path. Neither autocast nor the
    weights' ``requires_grad`` changes it: kernels don't ask for them either, and there is no backward.
    """
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return _reference(hidden, weights, topk_weights, topk_ids, expert_map, activation, compute)


def _reference(
    hidden: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: ExpertMap,
    activation: SwiGLUOAI,
    compute: torch.dtype,
) -> torch.Tensor:
    experts = weights.reference_experts
    slots = expert_map.on(hidden.device)
    with record_function("epfuse::route"):
        routes = route_reference.route(topk_ids, slots, weights.local_experts, block_m=1)
    with record_function("epfuse::gate_up"):
        y = gate_up_reference.gate_up(hidden, experts.w13, routes, topk_ids.shape[1], activation, compute)
    with record_function("epfuse::down"):
        routed = down_reference.down(y, experts.w2, routes, topk_weights, compute)
    with record_function("epfuse::combine"):
        dtype = torch.float64 if compute == torch.float64 else hidden.dtype
        return combine_reference.combine(routed, topk_ids, slots, None, dtype, compute)


def run_kernels(
    hidden: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: ExpertMap,
    activation: SwiGLUOAI,
    form: WeightFormat,
    tiles: LayerTiles,
    out: torch.Tensor,
    scratch: Scratch | None = None,
) -> torch.Tensor:
    """The layer in Triton kernels, activations as they are. No host sync; graph-capturable; bitwise repeatable."""
    from epfuse.stages.combine.launch import launch_combine
    from epfuse.stages.down.launch import launch_down
    from epfuse.stages.gate_up.launch import launch_gate_up
    from epfuse.stages.gate_up_down.launch import launch_gate_up_down
    from epfuse.stages.gather.launch import LoneTokens, launch_gather
    from epfuse.stages.route.launch import launch_route

    w13, w2, local = weights.kept[form].w13, weights.kept[form].w2, weights.local_experts
    assert not isinstance(w13, BlockFP8 | RowFP8)
    assert not isinstance(w2, BlockFP8 | RowFP8)
    slots = expert_map.on(hidden.device)
    num_routes, top_k = topk_ids.numel(), topk_ids.shape[1]
    if scratch is None:
        y = hidden.new_empty(num_routes, weights.intermediate)
        routed = hidden.new_empty(num_routes, weights.hidden)
    else:
        y = rows_in(scratch.y, num_routes, weights.intermediate)
        routed = rows_in(scratch.routed, num_routes, weights.hidden)
    # a caller's scratch may have out's memory for y, which is in use until down has finished
    out_is_free = scratch is None or not overlaps(y, out)
    with record_function("epfuse::route"):
        arrivals = tiles.arrivals(weights.hidden, weights.intermediate)
        routes = launch_route(topk_ids, slots, local, tiles.block_m, arrivals_per_block=arrivals)
    if isinstance(tiles.gate_up, Sm90PersistentTile):
        assert isinstance(w13, FragmentMXFP8)
        assert isinstance(w2, FragmentMXFP8)
        route_row = slots.new_empty(num_routes)
        lone = LoneTokens(topk_ids, slots, local, slots.new_empty(num_routes), out) if out_is_free else None
        with record_function("epfuse::gather"):
            # where down's results will be: a block's are written when its gathered rows are dead
            launch_gather(hidden, routes, top_k, routed, route_row, lone)
        with record_function("epfuse::gate_up_down"):
            launch_gate_up_down(routed, w13, w2, routes, topk_weights, activation, tiles.gate_up, y, routed, lone)
        with record_function("epfuse::combine"):
            return launch_combine(
                routed, topk_ids, slots, local, None, out, route_row, lone_stored=out_is_free, zeros_early=out_is_free
            )
    with record_function("epfuse::gate_up"):
        launch_gate_up(hidden, w13, routes, top_k, activation, tiles.gate_up, y)
    with record_function("epfuse::down"):
        launch_down(y, w2, routes, topk_weights, tiles.down, routed)
    with record_function("epfuse::combine"):
        return launch_combine(routed, topk_ids, slots, local, None, out, zeros_early=out_is_free)
