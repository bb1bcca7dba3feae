"""What ranks do in the tests of `epfuse bench --distributed`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from epfuse.bench import distributed
from epfuse.bench.contender import problem_of
from epfuse.bench.layers import LAYERS
from epfuse.bench.measure import Sampling
from epfuse.bench.routing import Routing
from epfuse.parallel.group import EPGroup, Pending
from epfuse.parallel.launch import RankContext
from epfuse.verify.subject import subjects_of


def bench(context: RankContext, broken: bool) -> list[dict[str, Any]]:
    """The rows of a small layer, as JSON; where ``broken``, the sum lacks a rank."""
    if broken:
        honest = EPGroup.start_all_reduce

        def start(self: EPGroup, partial: torch.Tensor, *rest: Any) -> Pending:
            return honest(self, torch.zeros_like(partial) if self.rank == 1 else partial, *rest)

        EPGroup.start_all_reduce = start  # type: ignore[method-assign]
    small = LAYERS["small"]
    layer = replace(
        small, shape=replace(small.shape, hidden=64, intermediate=32, local_experts=16 // context.group.size)
    )
    routings = (Routing.parse("uniform"), Routing.parse("all-to:1"))
    plan = distributed.DistributedPlan(layer, (3,), routings, 0, Sampling(samples=2, seconds=0.001))
    subjects = subjects_of(problem_of(layer, plan.tokens, context.device, plan.seed), "bf16")
    return [row.to_json() for row in distributed.run(context, plan, subjects)]
