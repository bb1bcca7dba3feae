"""What data parallel ranks do in tests: vLLM's own exchange, over gloo, around a layer that vLLM builds."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tests.conftest
import tests.integrations.vllm.conftest  # noqa: F401 - first, as pytest has them: the interpreter, and vLLM's platform

# ruff: isort: split
import vllm.distributed.parallel_state as parallel_state
from vllm.distributed.device_communicators import all2all
from vllm.v1.worker import workspace

import epfuse.api
from epfuse.config import SwiGLUOAI
from epfuse.integrations.vllm.experts import EpfuseExperts
from epfuse.parallel.launch import RankContext
from epfuse.target import REFERENCE_DEVICE
from epfuse.verify.oracle import add_experts
from epfuse.verify.scenarios import Scenario
from tests.integrations.vllm.deployments import M3_EP8, build

SMALL = M3_EP8.but(quantization=None, hidden=128, intermediate=64, experts=8, top_k=2, device="cpu")


@dataclass
class Group:
    """The group of all ranks, as vLLM's exchange calls it, with gloo under it; expert and data parallel alike.

    Attributes:
        rank_in_group, world_size: of this rank.
        sizes: each rank's own tokens.
        symmetric: whether results are wanted in memory that the group owns (0.32 and later).
    """

    rank_in_group: int
    world_size: int
    sizes: list[int]
    symmetric: bool

    def __post_init__(self) -> None:
        manager: Any = object.__new__(all2all.AgRsAll2AllManager)
        manager.rank, manager.world_size = self.rank_in_group, self.world_size
        manager.dp_rank, manager.dp_world_size = self.rank_in_group, self.world_size
        manager.tp_group, manager.use_ep = SimpleNamespace(world_size=1), True
        self.manager = manager
        self.device_communicator = SimpleNamespace(
            all2all_manager=manager, get_symmetric_memory_buffer=lambda name, *about: self.own(*about)
        )

    def __getattr__(self, name: str) -> Any:
        """Dispatch and combine are vLLM's."""
        return getattr(self.manager, name)

    def own(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        return torch.full(shape, torch.nan, dtype=dtype, device=device) if self.symmetric else None

    def all_gatherv(self, tensors: list[torch.Tensor], dim: int, sizes: list[int]) -> list[torch.Tensor]:
        found = []
        for tensor in tensors:
            every = [tensor.new_empty(size, *tensor.shape[1:]) for size in sizes]
            for rank, part in enumerate(every):
                if rank == self.rank_in_group:
                    part.copy_(tensor)
                dist.broadcast(part, rank)
            found.append(torch.cat(every))
        return found

    def reduce_scatterv(self, rows: torch.Tensor, dim: int, sizes: list[int]) -> torch.Tensor:
        total = rows.clone()
        dist.all_reduce(total)
        return total.split(sizes)[self.rank_in_group]

    def reduce_scatterv_into_output(
        self, rows: torch.Tensor, output: torch.Tensor, dim: int, sizes: list[int]
    ) -> torch.Tensor:
        return output.copy_(self.reduce_scatterv(rows, dim, sizes))


def data_parallel(context: RankContext, sizes: list[int], symmetric: bool) -> tuple[float, float]:
    """One layer of all ranks' tokens: this rank's error against float64, relative, and what a lost rank would make.

    Args:
        context: this rank.
        sizes: each rank's own tokens; the last of each are padding, without an expert.
        symmetric: as of `Group`.
    """
    ranks, rank = context.group.size, context.group.rank
    deployment = SMALL.but(ep_size=ranks, ep_rank=rank, dp_size=ranks)
    group = Group(rank, ranks, sizes, symmetric)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_EP", "_DP"):
            patch.setattr(parallel_state, name, group)
        patch.setattr(parallel_state, "_PCP", SimpleNamespace(world_size=1), raising=False)
        here = SimpleNamespace(dp_metadata=SimpleNamespace(get_chunk_sizes_across_dp_rank=lambda: sizes))
        patch.setattr(all2all, "get_forward_context", lambda: here)
        patch.setattr(workspace, "_manager", workspace.WorkspaceManager(torch.device("cpu")))
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        patch.setenv("EPFUSE_STRICT", "1")
        patch.setattr(epfuse.api, "target_of", lambda device: deployment.target)
        patch.setattr(epfuse.api, "device_name", lambda device: REFERENCE_DEVICE[deployment.target])

        rng = torch.Generator().manual_seed(7)  # the same on every rank
        experts, hidden_size, intermediate = deployment.experts, deployment.hidden, deployment.intermediate
        w13 = (torch.randn(experts, 2 * intermediate, hidden_size, generator=rng) / 8).bfloat16()
        w2 = (torch.randn(experts, hidden_size, intermediate, generator=rng) / 8).bfloat16()
        local = experts // ranks
        layer = build(deployment, patch)
        layer.w13_weight.data.copy_(w13[rank * local : (rank + 1) * local])
        layer.w2_weight.data.copy_(w2[rank * local : (rank + 1) * local])
        layer.quant_method.process_weights_after_loading(layer)
        assert type(layer.quant_method.moe_kernel.fused_experts) is EpfuseExperts

        every = []
        for tokens in sizes:
            hidden = torch.randn(tokens, hidden_size, generator=rng).bfloat16()
            weights, ids = torch.rand(tokens, experts, generator=rng).topk(deployment.top_k)
            ids[tokens - tokens // 3 :] = -1
            every.append(Scenario("own", hidden, weights, ids.int()))
        own = every[rank]
        result = layer.quant_method.apply(layer, own.hidden, own.topk_weights, own.topk_ids, None, None).double()

    oracle, lost = (torch.zeros(sizes[rank], hidden_size, dtype=torch.float64) for _ in range(2))
    add_experts(oracle, 0, w13, w2, own, SwiGLUOAI())
    add_experts(lost, 0, w13[:local], w2[:local], own, SwiGLUOAI())
    assert result.shape == oracle.shape
    if not own.tokens:
        return 0.0, 1.0
    assert not bool(result[(own.topk_ids < 0).all(1)].any())
    return tuple(float((found - oracle).norm() / oracle.norm()) for found in (result, lost))  # type: ignore[return-value]
