"""Functions that ranks run in tests: module-level, so that another process finds them."""

from __future__ import annotations

import os
import signal

import torch

from epfuse.parallel.launch import RankContext


def sum_of_ranks(context: RankContext, dtype: torch.dtype) -> list[float]:
    partial = torch.tensor([1.0 + context.group.rank, 256.0, 1.0], dtype=dtype, device=context.device)
    if context.group.rank:
        partial[1] = 1.0
    total = context.group.all_reduce(partial)
    assert total.dtype == dtype
    assert total.device == context.device
    return total.float().tolist()


def fail_on_last_rank(context: RankContext) -> None:
    if context.group.rank == context.group.size - 1:
        raise ValueError("the last rank has had enough")
    context.group.all_reduce(torch.zeros(1, device=context.device))


def kill_last_rank(context: RankContext) -> None:
    if context.group.rank == context.group.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)


def talk(context: RankContext) -> int:
    print("a rank says something")
    return context.group.rank
