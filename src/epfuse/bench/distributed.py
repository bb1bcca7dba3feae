"""One layer over real ranks: each rank's share, the sum over ranks alone, both together, and other exchange modes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from epfuse.bench.contender import problem_of
from epfuse.bench.inputs import HIDDEN_STD, least_variants
from epfuse.bench.layers import Layer
from epfuse.bench.measure import MOST_CALLS, Call, Sampling, Timing, TimingMethod, captured, elapsed, looped
from epfuse.bench.routing import Routing
from epfuse.config import Path
from epfuse.parallel.agreement import agree_on_layer, check_agreement, gather_text
from epfuse.parallel.group import SumIn
from epfuse.parallel.launch import RankContext
from epfuse.parallel.payload import payload_for
from epfuse.parallel.placement import ExpertPlacement
from epfuse.verify.budget import compare
from epfuse.verify.distributed import Way, settle, share_of, ways
from epfuse.verify.experts import dense_weights, in_format, mxfp8_weights
from epfuse.verify.problem import Problem
from epfuse.verify.scenarios import Scenario
from epfuse.verify.subject import Stored, Subject
from epfuse.verify.suite import add_rank, poisoned_memory, tolerance_of

FORMAT = "epfuse-bench-distributed-1"
"""First field of every record."""
SUMS = {f"all_reduce {sum_in.value}": sum_in for sum_in in SumIn}


@dataclass(frozen=True)
class DistributedPlan:
    """What to measure; the same on every rank.

    Attributes:
        layer: its ``ep_size`` is the number of ranks.
        tokens: counts T, over all ranks.
        routings: each with every token count.
        seed: of weights, activations and routings.
        sampling: how much.
    """

    layer: Layer
    tokens: tuple[int, ...]
    routings: tuple[Routing, ...]
    seed: int
    sampling: Sampling


@dataclass
class DistributedRow:
    """One path at one token count with one routing. It has times only if every exchange mode was right.

    Attributes:
        path, weights: the path and the format that it reads.
        routing: how tokens were spread.
        tokens: T, over all ranks; where tokens are a rank's own, it has an equal part.
        rows: by rank, the mean number of its routes.
        relative_error: worst exchange mode's.
        shard: by rank, the time of its share alone.
        sums: the sum of ``[T, H]`` over the ranks alone, by the dtype in which it travels; the slowest rank's.
        exchanges: the layer in each exchange mode, share and collectives together; the slowest rank's.
        failure: why there are no times.
    """

    path: str
    weights: str
    routing: str
    tokens: int
    rows: list[float] = field(default_factory=list)
    relative_error: float | None = None
    shard: list[Timing] = field(default_factory=list)
    sums: dict[str, Timing] = field(default_factory=dict)
    exchanges: dict[str, Timing] = field(default_factory=dict)
    failure: str | None = None

    @property
    def imbalance(self) -> float:
        """The busiest rank's routes over the mean."""
        return max(self.rows) / statistics.mean(self.rows) if sum(self.rows) else 1.0

    @property
    def slowest_shard_us(self) -> float:
        return max((timing.median_us for timing in self.shard), default=0.0)

    @property
    def fastest_sum_us(self) -> float:
        return min((timing.median_us for timing in self.sums.values()), default=0.0)

    @property
    def step_us(self) -> float:
        """The layer with its all_reduce, in the faster dtype."""
        return min((self.exchanges[name].median_us for name in SUMS if name in self.exchanges), default=0.0)

    @property
    def over_parts(self) -> float | None:
        """The step over the slowest share and the fastest sum, each alone: 1 means that nothing was lost between."""
        parts = self.slowest_shard_us + self.fastest_sum_us
        return self.step_us / parts if self.step_us and parts else None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values; times in microseconds."""
        derived = {"imbalance": self.imbalance, "over_parts": self.over_parts, "ok": self.failure is None}
        return asdict(self) | derived


def run(
    context: RankContext,
    plan: DistributedPlan,
    subjects: Sequence[Subject],
    advance: Callable[[str], None] = lambda what: None,
) -> Iterator[DistributedRow]:
    """The rows, one after another, on every rank; every rank must take all of them.

    Args:
        context: this rank.
        plan: what to measure.
        subjects: paths, of `problem_of` the plan's layer.
        advance: called with what is about to be measured.

    Raises:
        RanksDisagree: a rank was started with something else.
    """
    problem = problem_of(plan.layer, plan.tokens, context.device, plan.seed)
    facts = {"plan": str(plan), "subjects": str(subjects), "target": problem.target.value}
    check_agreement(context.group, facts)
    for stored in Stored:
        alike = [subject for subject in subjects if subject.stored is stored]
        if alike:
            yield from _run_alike(context, plan, problem, stored, alike, advance)


def _run_alike(
    context: RankContext,
    plan: DistributedPlan,
    problem: Problem,
    stored: Stored,
    subjects: list[Subject],
    advance: Callable[[str], None],
) -> Iterator[DistributedRow]:
    group = context.group
    draw = dense_weights if stored is Stored.DENSE else mxfp8_weights
    placement = ExpertPlacement.contiguous(problem.experts, group.size)
    points = [(routing, tokens) for routing in plan.routings for tokens in plan.tokens]
    calls = {point: _draw_calls(plan, context, *point) for point in points}
    advance(f"{stored.value} weights: the float64 oracle")
    oracles = {point: torch.zeros_like(drawn[0].hidden, dtype=torch.float64) for point, drawn in calls.items()}
    for expert in range(problem.experts):  # of all ranks: no collective has a part in what they are judged by
        one = draw(problem, [expert])
        for point, drawn in calls.items():
            add_rank(oracles[point], expert, one, drawn[0], problem.activation)
    source = draw(problem, placement.held[group.rank])
    expert_map = placement.expert_map(group.rank, context.device)
    agree_on_layer(group, source, expert_map, {}, placement)
    for subject in subjects:
        weights = in_format(source, subject.form, problem.target)
        share = share_of(problem, weights, expert_map, subject)
        for point, drawn in calls.items():
            routing, tokens = point
            advance(f"T={tokens} {routing}, {subject.path.value} {subject.form.value}")
            counts = [tokens // group.size + (rank < tokens % group.size) for rank in range(group.size)]
            modes = ways(group, placement, counts, payload_for(subject.path, weights))
            row = DistributedRow(subject.path.value, subject.form.value, str(routing), tokens)
            slots = expert_map.on(context.device)
            own = statistics.mean(int((slots[call.topk_ids.long()] >= 0).sum()) for call in drawn)
            row.rows = [json.loads(text) for text in gather_text(group, json.dumps(own))]
            _check(context, row, problem, subject, modes, drawn[0], oracles[point], share)
            if row.failure is None:
                _measure(context, row, plan.sampling, subject, modes, drawn, share)
            yield row


Share = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _draw_calls(plan: DistributedPlan, context: RankContext, routing: Routing, tokens: int) -> list[Scenario]:
    """Inputs that are run in turn, the same on every rank."""
    found = []
    for variant in range(least_variants(plan.layer, tokens)):
        rng = torch.Generator().manual_seed((plan.seed * 1_000_003 + tokens) * 101 + variant)
        ids = routing.draw(plan.layer.shape, tokens, variant, rng)
        scores = torch.rand(ids.shape, generator=rng) + 0.1
        hidden = HIDDEN_STD * torch.randn(tokens, plan.layer.shape.hidden, generator=rng)
        weights = scores / scores.sum(dim=1, keepdim=True)
        device = context.device
        found.append(
            Scenario("bench", hidden.to(device, torch.bfloat16), weights.to(device), ids.to(device, torch.int32))
        )
    return found


def _check(
    context: RankContext,
    row: DistributedRow,
    problem: Problem,
    subject: Subject,
    modes: list[Way],
    call: Scenario,
    oracle: torch.Tensor,
    share: Share,
) -> None:
    """Every mode against the oracle; the ranks tell each other, so that all of them go on in the same way."""
    worst, failures = 0.0, []
    for way in modes:
        with poisoned_memory():
            result = bound(way, call, share)()
        settle(context)
        difference = compare(result, oracle[way.got])
        worst = max(worst, difference.relative_error)
        if not difference.within(tolerance_of(problem, subject, call, way.sums)):
            failures.append(f"{way.name}: relative error {difference.relative_error:.2g}")
    told = [json.loads(text) for text in gather_text(context.group, json.dumps([worst, failures]))]
    row.relative_error = max(one[0] for one in told)
    wrong = [f"rank {rank}: {failure}" for rank, one in enumerate(told) for failure in one[1]]
    row.failure = f"the result is wrong: {'; '.join(wrong)}" if wrong else None


def bound(way: Way, call: Scenario, share: Share) -> Call:
    """A call in one exchange mode."""
    hidden, weights, ids = (tensor[way.passed] for tensor in (call.hidden, call.topk_weights, call.topk_ids))
    return lambda: way.mode(hidden, weights, ids, share)


def _measure(
    context: RankContext,
    row: DistributedRow,
    sampling: Sampling,
    subject: Subject,
    modes: list[Way],
    drawn: list[Scenario],
    share: Share,
) -> None:
    captures = context.device.type == "cuda" and subject.path is not Path.REFERENCE  # which syncs with the device

    def alone(call: Scenario) -> Call:
        return lambda: share(call.hidden, call.topk_weights, call.topk_ids)

    row.shard = time_together(context, [alone(call) for call in drawn], sampling, captures)
    for name, sum_in in SUMS.items():
        # a sum may write to what it is given: it gets rows that only it has
        rows = [torch.zeros_like(call.hidden) for call in drawn]
        sums = [lambda one=one, sum_in=sum_in: context.group.all_reduce(one, sum_in) for one in rows]
        row.sums[name] = _slowest(time_together(context, sums, sampling, captures))
    for way in modes:
        calls = [bound(way, call, share) for call in drawn]
        row.exchanges[way.name] = _slowest(time_together(context, calls, sampling, captures and way.captured))


def time_together(context: RankContext, calls: Sequence[Call], sampling: Sampling, captures: bool) -> list[Timing]:
    """Time the same calls on all ranks, which begin each sample together; by rank.

    Args:
        context: this rank.
        calls: run in turn; each has been called before.
        sampling: how much.
        captures: whether the calls go into one graph, collectives included.
    """
    device, group = context.device, context.group

    def make(repeats: int) -> Callable[[], None]:
        if captures:
            return captured(calls, repeats, device, "thread_local").run
        return looped(calls, repeats, device).run

    def sample(run: Callable[[], None]) -> float:
        with group.waiting():
            dist.barrier()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return elapsed(run, device)

    once = make(1)
    sample(once)
    nanoseconds = round(1e9 * statistics.median(sample(once) for _ in range(3)))
    estimate = 1e-9 * max(1, group.largest(torch.tensor(nanoseconds, device=group.device)))
    # as many on every rank: a collective more on one of them would wait for ever
    repeats = max(1, min(max(1, MOST_CALLS // len(calls)), round(sampling.seconds / estimate)))
    many = make(repeats) if repeats > 1 else once
    sample(many)
    method = TimingMethod.GRAPH if captures else TimingMethod.PLAIN
    own = Timing.of([sample(many) for _ in range(sampling.samples)], repeats * len(calls), method)
    return [Timing(**json.loads(text)) for text in gather_text(group, json.dumps(asdict(own)))]


def _slowest(timings: list[Timing]) -> Timing:
    return max(timings, key=lambda timing: timing.median_us)
