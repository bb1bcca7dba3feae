"""What ranks with a GPU each do in tests: module-level, so that another process finds it."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import torch

from epfuse import ExpertWeights, fused_experts
from epfuse.parallel.exchange import Replicated
from epfuse.parallel.placement import ExpertPlacement
from epfuse.parallel.torchrun import torchrun_ranks
from epfuse.report.write import write_atomic
from epfuse.verify.distributed import settle
from tests.parallel.guard_entries import become_rank

LIMIT = 8.0
"""Seconds for which a rank of these tests may hold the other one."""
HELD_BYTES = 1 << 30
"""What a rank keeps of its GPU's memory beside the layer, to see it given back."""


def layer_forever(rank: int, ranks: int, port: int, folder: Path, replayed: bool) -> None:
    """One layer over all ranks, again and again, eagerly or as replays of a graph with its all-reduce in it.

    Args:
        rank, ranks: as torchrun numbers them; the store is somebody else's, as under torchrun.
        port: of the store.
        folder: gets ``steps-RANK`` with the steps done, and what the rank says.
        replayed: whether the steps are replays.
    """
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    become_rank(rank, ranks, port, folder)
    with torchrun_ranks(LIMIT) as context:
        group, device = context.group, context.device
        held = torch.ones(HELD_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
        torch.manual_seed(0)
        tokens, top_k, hidden_size, intermediate, experts = 64, 2, 512, 256, 8
        placement = ExpertPlacement.contiguous(experts, ranks)
        w13 = torch.randn(experts, 2 * intermediate, hidden_size) / hidden_size**0.5
        w2 = torch.randn(experts, hidden_size, intermediate) / intermediate**0.5
        own = [placement.shard(full.bfloat16(), rank).to(device) for full in (w13, w2)]
        weights, expert_map = ExpertWeights.dense(*own), placement.expert_map(rank, device)
        hidden = torch.randn(tokens, hidden_size).bfloat16().to(device)
        topk_weights, topk_ids = (each.to(device) for each in torch.rand(tokens, experts).topk(top_k))
        exchange = Replicated(group)

        def step() -> torch.Tensor:
            return exchange(
                hidden,
                topk_weights,
                topk_ids,
                lambda x, routed, ids: fused_experts(x, weights, routed, ids, expert_map),
            )

        wanted = step()
        settle(context)
        if replayed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = step()
        for number in itertools.count(1):
            if replayed:
                graph.replay()
            else:
                result = step()
            settle(context)
            assert torch.equal(result, wanted)
            write_atomic(folder / f"steps-{rank}", f"{os.getpid()} {number}")
        del held
