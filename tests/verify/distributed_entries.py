"""What ranks do in the tests of `epfuse verify --distributed`."""

from __future__ import annotations

from typing import Any

import torch

from epfuse.parallel.group import EPGroup, Pending
from epfuse.parallel.launch import RankContext
from epfuse.verify import distributed
from epfuse.verify.problem import Problem
from epfuse.verify.scenarios import KINDS
from epfuse.verify.subject import subjects_of

KEPT = {"skewed", "one rank", "foreign ids", "NaN weight"}


def verify(context: RankContext, broken: str) -> tuple[bool, dict[str, list[str]]]:
    """Run the suite on a small layer, with something ``broken``. Whether it passed, and failures by exchange."""
    problem = Problem(
        hidden=32,
        intermediate=32,
        experts=5 * context.group.size,
        top_k=2,
        ep_size=context.group.size,
        tokens=(3,),
        dtype=torch.bfloat16,
        device=context.device,
        seed=0,
    )
    for kind in set(KINDS) - KEPT:  # the others differ in what one rank computes, which the other suite looks at
        del KINDS[kind]
    if broken == "seed" and context.group.rank == 1:
        object.__setattr__(problem, "seed", 1)
    if broken in BREAK:
        BREAK[broken](context.group.rank)
    record = distributed.run(context, problem, subjects_of(problem, "bf16"))
    found: dict[str, list[str]] = {}
    for case in record.cases:
        assert isinstance(case, distributed.RankCase)
        found.setdefault(case.exchange, []).extend(case.failures)
    return record.ok, found


def _lose_a_rank(rank: int) -> None:
    """The sum is that of the other ranks."""
    honest = EPGroup.start_all_reduce

    def start(self: EPGroup, partial: torch.Tensor, *rest: Any) -> Pending:
        return honest(self, torch.zeros_like(partial) if self.rank == 1 else partial, *rest)

    EPGroup.start_all_reduce = start  # type: ignore[method-assign]


def _round_elsewhere(rank: int) -> None:
    """One rank's result has another last bit."""
    honest = EPGroup.start_all_reduce

    def start(self: EPGroup, partial: torch.Tensor, *rest: Any) -> Pending:
        pending = honest(self, partial, *rest)
        total = pending.finish()
        if self.rank == 1:
            total.view(torch.int16)[0, 0] ^= 1
        return Pending(total, total, None, self.waiting, total)

    EPGroup.start_all_reduce = start  # type: ignore[method-assign]


def _send_astray(rank: int) -> None:
    """What one rank should get goes to another one."""
    honest = EPGroup.start_all_to_all

    def start(self: EPGroup, rows: torch.Tensor) -> Pending:
        return honest(self, rows.flip(0) if rows.dtype == torch.uint8 else rows)

    EPGroup.start_all_to_all = start  # type: ignore[method-assign]


BREAK = {"sum": _lose_a_rank, "bits": _round_elsewhere, "dispatch": _send_astray}
