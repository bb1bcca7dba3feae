"""route -> quantize -> gate_up -> activate -> down -> combine: the layer with FP8 activations.

With weights in ROW_FP8 gate_up activates itself, and what is left of activate is to quantise its rows.
"""

from __future__ import annotations

import torch
from torch.profiler import record_function

from epfuse.config import Combine, SwiGLUOAI, WeightFormat
from epfuse.errors import ConfigError
from epfuse.expert_map import ExpertMap
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.operands import overlaps
from epfuse.scratch import Scratch, rows_in
from epfuse.stages.quantize.rows import FP8Rows, groups_of
from epfuse.stages.tiles import LayerTiles, Sm90PersistentTile
from epfuse.weights.block_fp8 import BlockFP8, scale_block
from epfuse.weights.experts import ExpertWeights
from epfuse.weights.row_fp8 import RowFP8


def run_fp8_kernels(
    hidden: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: ExpertMap,
    activation: SwiGLUOAI,
    form: WeightFormat,
    tiles: LayerTiles,
    combine: Combine,
    out: torch.Tensor,
    scratch: Scratch | None = None,
) -> torch.Tensor:
    """The layer in kernels with native FP8 dots, on MXFP8 or block FP8 weights, or on those with one scale a row.

    No host sync; graph-capturable; bitwise repeatable unless ``combine`` is ATOMIC, which ROW_FP8 has not.
    """
    if form is WeightFormat.ROW_FP8:
        assert combine is Combine.DETERMINISTIC
        return run_packed_fp8_kernels(
            hidden, weights, topk_weights, topk_ids, expert_map, activation, tiles, out, scratch
        )
    from epfuse.stages.activate.launch import launch_activate
    from epfuse.stages.combine.launch import launch_combine
    from epfuse.stages.down.launch_fp8 import launch_down_fp8
    from epfuse.stages.gate_up.launch_fp8 import launch_gate_up_fp8
    from epfuse.stages.quantize.launch import launch_quantize
    from epfuse.stages.route.launch import launch_route

    experts, local = weights.kept[form], weights.local_experts
    w13, w2 = experts.w13, experts.w2
    assert isinstance(w13, MXFP8 | BlockFP8)
    assert isinstance(w2, MXFP8 | BlockFP8)
    group, values = scale_block(w13)[1], w13.values.dtype
    slots, routes_in_all = expert_map.on(hidden.device), topk_ids.numel()
    x_rows = y_rows = gate_up_rows = routed_rows = None
    if scratch is not None:  # x is dead when y is written, and gate_up when routed is
        x_rows = fp8_rows_in(scratch.y, hidden.shape[0], weights.hidden, group, values)
        y_rows = fp8_rows_in(scratch.y, routes_in_all, weights.intermediate, group, values)
        gate_up_rows = rows_in(scratch.routed, routes_in_all, 2 * weights.intermediate)
        routed_rows = rows_in(scratch.routed, routes_in_all, weights.hidden)
    with record_function("epfuse::route"):
        routes = launch_route(topk_ids, slots, local, tiles.block_m)
    with record_function("epfuse::quantize"):
        x = launch_quantize(hidden, group, dtype=values, out=x_rows)
    with record_function("epfuse::gate_up"):
        gate_up = launch_gate_up_fp8(x, w13, routes, topk_ids.shape[1], tiles.gate_up, hidden.dtype, gate_up_rows)
    with record_function("epfuse::activate"):
        y = launch_activate(gate_up, routes, activation, group, dtype=values, out=y_rows)
    if combine is Combine.ATOMIC:
        with record_function("epfuse::down"):
            total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
            launch_down_fp8(y, w2, routes, topk_weights, tiles.down, combine, total)
        # out may be made in inference mode, and then is written in it alone
        with record_function("epfuse::combine"), torch.inference_mode():
            return out.copy_(total)
    with record_function("epfuse::down"):
        if routed_rows is None:
            routed_rows = torch.empty(routes_in_all, weights.hidden, dtype=hidden.dtype, device=hidden.device)
        routed = launch_down_fp8(y, w2, routes, topk_weights, tiles.down, combine, routed_rows)
    with record_function("epfuse::combine"):
        return launch_combine(routed, topk_ids, slots, local, None, out)


def run_packed_fp8_kernels(
    hidden: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: ExpertMap,
    activation: SwiGLUOAI,
    tiles: LayerTiles,
    out: torch.Tensor,
    scratch: Scratch | None = None,
) -> torch.Tensor:
    """The layer on Hopper with weights in ROW_FP8: rows lie packed in the route table's order, a scale each.

    No host sync; graph-capturable; bitwise repeatable.
    """
    from epfuse.stages.combine.launch import launch_combine
    from epfuse.stages.down.launch_sm90_fp8 import launch_down_sm90_fp8
    from epfuse.stages.gate_up.launch_sm90_fp8 import launch_gate_up_sm90_fp8
    from epfuse.stages.gather.launch import LoneTokens
    from epfuse.stages.quantize.launch_packed import launch_quantize_packed
    from epfuse.stages.route.launch import launch_route

    experts, local = weights.kept[WeightFormat.ROW_FP8], weights.local_experts
    w13, w2, tile = experts.w13, experts.w2, tiles.gate_up
    assert isinstance(w13, RowFP8)
    assert isinstance(w2, RowFP8)
    if not isinstance(tile, Sm90PersistentTile):  # a file of trials may name any
        raise ConfigError(f"tile {tile.key} is not persistent; with one scale a row it must be")
    slots, (tokens, top_k) = expert_map.on(hidden.device), topk_ids.shape
    size, between, rows = weights.hidden, weights.intermediate, tokens * top_k
    if scratch is None:
        x_rows, y_rows = (FP8Rows.empty(rows, n, n, torch.float8_e4m3fn, hidden.device) for n in (size, between))
        gate_up_rows, routed_rows = hidden.new_empty(rows, between), hidden.new_empty(rows, size)
    else:
        # x and gate_up lie where routed will be: both are dead when down begins. The scales of x are dead when y's
        # values are written to their place.
        memory = scratch.routed.view(-1).view(torch.uint8)
        values = memory[: rows * size].view(torch.float8_e4m3fn).view(rows, size)
        scales = scratch.y.view(-1).view(torch.uint8)[:rows].view(rows, 1)
        x_rows = FP8Rows(values, scales, size)
        gate_up_rows = rows_in(scratch.routed.view(-1)[rows * size // 2 :], rows, between)
        y_rows = fp8_rows_in(scratch.y, rows, between, between, torch.float8_e4m3fn)
        routed_rows = rows_in(scratch.routed, rows, size)
    # a caller's scratch may have out's memory for y, which is in use until down has finished
    out_is_free = scratch is None or not overlaps(scratch.y, out)
    lone = LoneTokens(topk_ids, slots, local, slots.new_empty(rows), out) if out_is_free else None
    route_row = slots.new_empty(rows)
    with record_function("epfuse::route"):
        routes = launch_route(topk_ids, slots, local, tiles.block_m, arrivals_per_block=tiles.arrivals(size, between))
    with record_function("epfuse::quantize"):
        x = launch_quantize_packed(hidden, routes, top_k, x_rows, route_row, lone)
    with record_function("epfuse::gate_up"):
        gate_up = launch_gate_up_sm90_fp8(x, w13, routes, activation, tile, gate_up_rows)
    with record_function("epfuse::activate"):
        y = launch_quantize_packed(gate_up, routes, None, y_rows)
    with record_function("epfuse::down"):
        routed = launch_down_sm90_fp8(y, w2, routes, topk_weights, tile, routed_rows, lone)
    with record_function("epfuse::combine"):
        return launch_combine(
            routed, topk_ids, slots, local, None, out, route_row, lone_stored=out_is_free, zeros_early=out_is_free
        )


def fp8_rows_in(buffer: torch.Tensor, rows: int, columns: int, group: int, dtype: torch.dtype) -> FP8Rows:
    """``[rows, columns]`` values at the beginning of a contiguous buffer, their scales behind them."""
    memory, values = buffer.view(-1).view(torch.uint8), rows * columns
    scales = rows * groups_of(columns, group)
    return FP8Rows(
        memory[:values].view(dtype).view(rows, columns),
        memory[values : values + scales].view(rows, groups_of(columns, group)),
        group,
    )
