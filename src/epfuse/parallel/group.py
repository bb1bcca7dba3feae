"""The ranks that share one layer's experts, and what they send each other."""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from epfuse.arguments import integer, member
from epfuse.errors import ConfigError
from epfuse.expert_map import ExpertMap

# torch 2.13 has new names for them and warns of the old ones
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class SumIn(enum.Enum):
    """The dtype in which partial sums travel and are added."""

    FLOAT32 = "float32"
    """Rounded once, to the partials' dtype, when all are added. Twice the bytes of 16-bit partials."""
    PARTIALS = "partials"
    """As the partials are: the backend rounds after its additions, up to P - 1 times."""


@dataclass(frozen=True)
class Pending:
    """A collective on its way: torch.distributed runs it beside what the caller does until `finish`.

    Args:
        result: where it writes.
        like: tensor whose dtype and device the caller gets.
        work: torch.distributed's handle; None where there is nothing to wait for.
        waiting: as of `EPGroup`.
        sent: kept alive until the end.
    """

    result: torch.Tensor
    like: torch.Tensor
    work: dist.Work | None
    waiting: Callable[[], AbstractContextManager[None]]
    sent: torch.Tensor

    def finish(self) -> torch.Tensor:
        """Wait for it; on a GPU the current stream waits, and the host doesn't."""
        if self.work is not None:
            with self.waiting():
                self.work.wait()
        return self.result.to(self.like.device, self.like.dtype)


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

    @property
    def device(self) -> torch.device:
        """Where what is sent has to lie: the current GPU with NCCL (RCCL), else the host's memory."""
        return torch.device("cuda", torch.cuda.current_device()) if self.backend == "nccl" else torch.device("cpu")

    def expert_map(self, num_experts: int, device: torch.device | str = "cpu") -> ExpertMap:
        """This rank's contiguous share of E experts: E // P, and one more of the first E % P ranks.

        Raises:
            ConfigError: E is not a positive integer.
        """
        return ExpertMap.contiguous(num_experts, self.size, self.rank, device)

    def all_reduce(self, partial: torch.Tensor, sum_in: SumIn = SumIn.FLOAT32) -> torch.Tensor:
        """Sum over the ranks: `start_all_reduce`, and wait.

        Args:
            partial: this rank's output, any shape; bf16, fp16 or fp32.
            sum_in: how it travels.

        Returns:
            The sum, same shape, dtype and device; the same bits on every rank.
        """
        member("sum_in", sum_in, SumIn)
        return self.start_all_reduce(partial, sum_in).finish()

    def start_all_reduce(self, partial: torch.Tensor, sum_in: SumIn = SumIn.FLOAT32) -> Pending:
        """Begin to sum over the ranks.

        A collective in bf16 would round after every addition, P-1 times on a ring; in float32 the result has the
        partials' own rounding and one more, whatever P is. Gloo gets the tensor through host memory, which is what lets
        ranks share one GPU.

        Args:
            partial: this rank's output, any shape; bf16, fp16 or fp32. Its memory may be reused.
            sum_in: how it travels.

        Returns:
            The sum, same shape, dtype and device; the same bits on every rank.
        """
        member("sum_in", sum_in, SumIn)  # not by a decorator, which torch.compile can't trace
        if self.size == 1:
            return self._alone(partial)
        wire = self._on_wire(partial, sum_in)
        work = dist.all_reduce(wire, dist.ReduceOp.SUM, group=self.process_group, async_op=True)
        return Pending(wire, partial, work, self.waiting, wire)

    def start_reduce_scatter(self, partial: torch.Tensor, sum_in: SumIn = SumIn.FLOAT32) -> Pending:
        """Begin to sum over the ranks, of which each gets its own share of the rows.

        Args:
            partial: ``[P * n, ...]`` contiguous; the same shape on every rank.
            sum_in: how it travels.

        Returns:
            ``[n, ...]``: rows ``rank * n`` to ``(rank + 1) * n`` of the sum.
        """
        member("sum_in", sum_in, SumIn)  # not by a decorator, which torch.compile can't trace
        if self.size == 1:
            return self._alone(partial)
        wire = self._on_wire(partial, sum_in)
        total = wire.new_empty(wire.shape[0] // self.size, *wire.shape[1:])
        work = _reduce_scatter(total, wire, group=self.process_group, async_op=True)
        return Pending(total, partial, work, self.waiting, wire)

    def start_all_gather(self, rows: torch.Tensor) -> Pending:
        """Begin to give every rank all ranks' rows.

        Args:
            rows: ``[n, ...]`` contiguous; the same shape and dtype on every rank.

        Returns:
            ``[P * n, ...]``, rank by rank.
        """
        if self.size == 1:
            return self._alone(rows)
        wire = rows.to(self._wire_device(rows))
        gathered = wire.new_empty(self.size * wire.shape[0], *wire.shape[1:])
        work = _all_gather(gathered, wire, group=self.process_group, async_op=True)
        return Pending(gathered, rows, work, self.waiting, wire)

    def start_all_to_all(self, rows: torch.Tensor) -> Pending:
        """Begin to give each rank its part of this rank's rows, and this rank its part of everybody's.

        Args:
            rows: ``[P * n, ...]`` contiguous, n rows for each rank; the same shape and dtype on every rank.

        Returns:
            ``[P * n, ...]``, n rows from each rank.
        """
        if self.size == 1:
            return self._alone(rows)
        wire = rows.to(self._wire_device(rows))
        received = torch.empty_like(wire)
        work = dist.all_to_all_single(received, wire, group=self.process_group, async_op=True)
        return Pending(received, rows, work, self.waiting, wire)

    def largest(self, value: torch.Tensor) -> int:
        """The largest number that any rank has. A host sync.

        Args:
            value: of one element, any integer dtype, on the group's device.
        """
        if self.size > 1:
            value = value.to(self._wire_device(value), torch.int64, copy=True)
            with self.waiting():
                dist.all_reduce(value, dist.ReduceOp.MAX, group=self.process_group)
                return int(value)
        return int(value)

    def _alone(self, rows: torch.Tensor) -> Pending:
        return Pending(rows, rows, None, self.waiting, rows)

    def _on_wire(self, partial: torch.Tensor, sum_in: SumIn) -> torch.Tensor:
        dtype = torch.float32 if sum_in is SumIn.FLOAT32 else partial.dtype
        return partial.to(self._wire_device(partial), dtype)

    def _wire_device(self, tensor: torch.Tensor) -> torch.device:
        return torch.device("cpu") if self.backend == "gloo" else tensor.device
