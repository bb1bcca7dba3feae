"""What commands under torchrun share: the first rank's bar, and what a record says of the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from epfuse.parallel.launch import RankContext
from epfuse.report.terminal import bars


@contextmanager
def first_ranks_bar(context: RankContext, words: str, total: int | None) -> Iterator[Callable[..., None]]:
    """What moves the bar, with other words if it is given any; the other ranks show none.

    Args:
        context: this rank.
        words: what the bar says first.
        total: steps; None if nobody knows, and then it does not move.
    """
    if context.group.rank:
        yield lambda what=None: None
        return
    with bars() as progress:
        task = progress.add_task(words, total=total)
        yield lambda what=None: progress.update(task, description=what, advance=None if total is None else 1)


def ranks_of(context: RankContext) -> dict[str, object]:
    """How many, what they talk through, and its version where that is NCCL."""
    nccl = context.group.backend == "nccl"
    return {
        "size": context.group.size,
        "backend": context.group.backend,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,  # type: ignore[no-untyped-call]
    }
