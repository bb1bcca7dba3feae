"""Routing in plain PyTorch: the oracle of the kernels."""

from __future__ import annotations

import torch

from epfuse.stages.route.table import RouteTable, max_padded


def local_experts(topk_ids: torch.Tensor, expert_map: torch.Tensor) -> torch.Tensor:
    """``[R]`` int64: the local slot of each route, -1 where its expert is remote or its id is outside [0, E)."""
    ids = topk_ids.reshape(-1).long()
    known = (ids >= 0) & (ids < expert_map.numel())
    slots = expert_map.long()[torch.where(known, ids, 0)]
    return torch.where(known, slots, -1)


def table_order(slots: torch.Tensor) -> torch.Tensor:
    """``[n]`` int64: the local routes, grouped by expert, ascending within one; from `local_experts`' slots."""
    return torch.argsort(slots, stable=True)[int((slots < 0).sum()) :]


def route(topk_ids: torch.Tensor, expert_map: torch.Tensor, local: int, block_m: int) -> RouteTable:
    """Group the local routes by expert and pad each group to ``block_m``.

    Args:
        topk_ids: ``[T, K]`` integer global expert ids; anything outside [0, E) is skipped.
        expert_map: ``[E]`` int32, local slot or -1.
        local: L.
        block_m: rows of one block, >= 1.

    Returns:
        RouteTable; slots past num_padded hold the sentinel R, blocks past the last one -1.
    """
    slots = local_experts(topk_ids, expert_map)
    routes = slots.numel()
    size = max_padded(routes, local, block_m)
    counts = torch.bincount(slots[slots >= 0], minlength=local)
    padded = (counts + block_m - 1) // block_m * block_m
    starts = torch.cumsum(padded, 0) - padded
    order = table_order(slots)
    owner = slots[order]
    rank = torch.arange(order.numel(), device=order.device) - (torch.cumsum(counts, 0) - counts)[owner]
    sorted_routes = torch.full((size,), routes, dtype=torch.int32, device=slots.device)
    sorted_routes[starts[owner] + rank] = order.int()
    block_expert = torch.full((size // block_m,), -1, dtype=torch.int32, device=slots.device)
    blocks = torch.repeat_interleave(torch.arange(local, device=slots.device), padded // block_m)
    block_expert[: blocks.numel()] = blocks.int()
    block_row = torch.full_like(block_expert, -1)
    before = (starts // block_m)[blocks]  # blocks of the experts before
    inside = (torch.arange(blocks.numel(), device=slots.device) - before) * block_m
    block_row[: blocks.numel()] = ((torch.cumsum(counts, 0) - counts)[blocks] + inside).int()
    used = padded.sum().to(torch.int32).reshape(1)
    return RouteTable(sorted_routes, block_expert, block_row, used, routes, block_m)
