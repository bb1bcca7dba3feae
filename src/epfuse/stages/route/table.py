"""RouteTable: which routes this rank runs, grouped by expert in blocks of block_m."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RouteTable:
    """The local routes of one call.

    Attributes:
        sorted_routes: ``[max_padded]`` int32; route ids grouped by local expert, ascending within an expert; a group
            is padded to a multiple of block_m with the sentinel R. What lies at and past num_padded is undefined.
        block_expert: ``[max_padded / block_m]`` int32; the local expert of each block; undefined past the last one.
        block_row: ``[max_padded / block_m]`` int32; how many local routes come before each block, padding not counted:
            the row of its first route where rows lie packed in the table's order; undefined past the last block.
        num_padded: ``[1]`` int32 on the device: slots in use, a multiple of block_m; 0 when no route is local. The
            authority on how much there is to do: a program past it returns at once.
        num_routes: R = T*K.
        block_m: rows of one block.
        arrivals: int32 zeros for kernels whose programs share a tile, from `launch_route`; None if none do.
    """

    sorted_routes: torch.Tensor
    block_expert: torch.Tensor
    block_row: torch.Tensor
    num_padded: torch.Tensor
    num_routes: int
    block_m: int
    arrivals: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, num_routes: int, local_experts: int, block_m: int, device: torch.device, arrivals_per_block: int = 0
    ) -> RouteTable:
        """Memory for the table of R routes over L experts, which `launch_route` fills.

        Args:
            num_routes: R.
            local_experts: L.
            block_m: rows of one block.
            device: where.
            arrivals_per_block: counters for each block that the table can hold, for kernels that share a tile.
        """
        size = max_padded(num_routes, local_experts, block_m)
        blocks = size // block_m

        def empty(count: int) -> torch.Tensor:
            return torch.empty(count, dtype=torch.int32, device=device)

        counters = blocks * arrivals_per_block
        arrivals = empty(counters) if counters else None
        return cls(empty(size), empty(blocks), empty(blocks), empty(1), num_routes, block_m, arrivals)

    @property
    def max_padded(self) -> int:
        """Slots that the buffers have; every launch is sized from it."""
        return self.sorted_routes.numel()

    @property
    def blocks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """What a kernel finds its block's routes and expert by: sorted_routes, block_expert, num_padded, num_routes."""
        return self.sorted_routes, self.block_expert, self.num_padded, self.num_routes

    def packed(
        self, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """The same for kernels of packed rows that count arrivals, from the ``first`` counter on.

        In the order of their operands: sorted_routes, block_expert, block_row, num_padded, arrivals, num_routes.
        """
        assert self.arrivals is not None
        arrivals = self.arrivals[first:] if first else self.arrivals
        return self.sorted_routes, self.block_expert, self.block_row, self.num_padded, arrivals, self.num_routes

    @property
    def max_blocks(self) -> int:
        return self.block_expert.numel()

    def groups(self) -> Iterator[tuple[int, torch.Tensor]]:
        """``(local expert, its route ids [n] int64)`` for each active expert, in order. Syncs with the device."""
        used = int(self.num_padded)
        slots = self.sorted_routes[:used].view(-1, self.block_m)
        owners = self.block_expert[: used // self.block_m]
        for expert in torch.unique(owners).tolist():
            routes = slots[owners == expert].reshape(-1)
            yield expert, routes[routes < self.num_routes].long()


@dataclass(frozen=True)
class LoneTokens:
    """Which packed rows are all that their token gets from this rank: what down makes of them is the result.

    Args:
        topk_ids: ``[T, K]`` int32 or int64, contiguous.
        expert_map: ``[E]`` int32.
        local: L.
        of_row: ``[R]`` int32, written by what packs the rows: the token of a row, or -1 if it has another local route.
        out: ``[T, H]``, dtype of the rows: where down leaves the result of such a token; other rows stay as they are.
        stored: whether there are such rows in this call: if not, all of ``of_row`` are -1, and combine makes the
            results. A run-time argument of the kernels, which are the same either way.
    """

    topk_ids: torch.Tensor
    expert_map: torch.Tensor
    local: int
    of_row: torch.Tensor
    out: torch.Tensor
    stored: bool

    @classmethod
    def of(
        cls, topk_ids: torch.Tensor, expert_map: torch.Tensor, local: int, out: torch.Tensor, stored: bool
    ) -> LoneTokens:
        """With new memory for ``of_row``; arguments as of the class."""
        return cls(topk_ids, expert_map, local, expert_map.new_empty(topk_ids.numel()), out, stored)


def where_stored(lone: LoneTokens | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``of_row`` and ``out`` of lone tokens, as kernels take them; None for both where there are none."""
    return (None, None) if lone is None else (lone.of_row, lone.out)


def max_padded(num_routes: int, local_experts: int, block_m: int) -> int:
    """The most slots that R routes over L experts can need, known without looking at the routing.

    ``min(R * block_m, R + L * (block_m - 1))``, rounded down to a block: at most R blocks hold one route each, and at
    most L blocks are partly filled.
    """
    bound = min(num_routes * block_m, num_routes + local_experts * (block_m - 1))
    return bound // block_m * block_m
