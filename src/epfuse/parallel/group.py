"""The ranks that share one layer's experts, and the sum over them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from epfuse.arguments import integer
from epfuse.errors import ConfigError
from epfuse.expert_map import ExpertMap


@dataclass(frozen=True)
class EPGroup:
    """One rank's view of an expert-parallel group.

    Every rank sees the same tokens (activations are replicated) and holds a share of the experts, so the layer's output
    is the sum of the ranks' outputs. Build it with `current` or `single`.

    Args:
        rank: this rank, 0..P-1.
        size: P.
        process_group: the torch.distributed group; None is the default group, or no group at all when P is 1.
        backend: the group's backend, ``"gloo"`` or ``"nccl"`` (RCCL too goes by that name); ``""`` when P is 1.
        waiting: its result is entered while this rank waits for the others; how a launcher knows who waits for whom.

    Raises:
        ConfigError: ``rank`` or ``size`` is no integer, or ``rank`` is outside 0..P-1.
    """

    rank: int
    size: int
    process_group: dist.ProcessGroup | None = None
    backend: str = ""
    waiting: Callable[[], AbstractContextManager[None]] = field(default=nullcontext, repr=False, compare=False)

    def __post_init__(self) -> None:
        size = integer("EPGroup.size", self.size, least=1)
        if integer("EPGroup.rank", self.rank) >= size:
            raise ConfigError(f"EPGroup.rank is {self.rank}; it must be in 0..{self.size - 1}")

    @classmethod
    def single(cls) -> EPGroup:
        """One rank that holds every expert; needs no torch.distributed."""
        return cls(0, 1)

    @classmethod
    def current(cls, process_group: dist.ProcessGroup | None = None) -> EPGroup:
        """The calling process's place in ``process_group`` (None: the default group).

        Raises:
            ConfigError: torch.distributed is not initialised, or this process is not in the group.
        """
        if not dist.is_initialized():
            raise ConfigError(
                "torch.distributed is not initialised; call init_process_group() first, or EPGroup.single()"
            )
        rank = dist.get_rank(process_group)
        if rank < 0:
            raise ConfigError("this process is not a member of process_group")
        return cls(rank, dist.get_world_size(process_group), process_group, dist.get_backend(process_group))

    def expert_map(self, num_experts: int, device: torch.device | str = "cpu") -> ExpertMap:
        """This rank's contiguous share of E experts: E // P, and one more of the first E % P ranks.

        Raises:
            ConfigError: E is not a positive integer.
        """
        return ExpertMap.contiguous(num_experts, self.size, self.rank, device)

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, accumulated in float32 and rounded once.

        A collective in bf16 would round after every addition, P-1 times on a ring; here 16-bit partials travel as
        float32 (twice the bytes), so the result has the partials' own rounding and one more, whatever P is.
        Gloo gets the tensor through host memory, which is what lets ranks share one GPU.

        Args:
            partial: this rank's output, any shape; bf16, fp16 or fp32. Its memory may be reused.

        Returns:
            The sum, same shape, dtype and device; the same bits on every rank.
        """
        if self.size == 1:
            return partial
        wire_device = torch.device("cpu") if self.backend == "gloo" else partial.device
        wire = partial.to(wire_device, torch.float32)
        with self.waiting():
            dist.all_reduce(wire, dist.ReduceOp.SUM, group=self.process_group)
        return wire.to(partial.device, partial.dtype)
