"""The suite over real ranks: the sum that torch.distributed makes must be the unsharded layer, in every exchange mode.

Each rank computes the unsharded oracle itself, from all experts, one after another: no collective takes part in what
the collectives are judged by.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from epfuse.api import fused_experts
from epfuse.config import Path
from epfuse.expert_map import ExpertMap
from epfuse.parallel.agreement import agree_on_layer, check_agreement, gather_text
from epfuse.parallel.exchange import (
    AllGather,
    CompactDispatch,
    Dispatch,
    Exchange,
    Experts,
    Replicated,
    SequenceParallel,
)
from epfuse.parallel.group import EPGroup, SumIn
from epfuse.parallel.launch import RankContext
from epfuse.parallel.payload import Payload, payload_for
from epfuse.parallel.placement import ExpertPlacement
from epfuse.verify.budget import LEAST_SIZE, compare
from epfuse.verify.experts import dense_weights, in_format, mxfp8_weights
from epfuse.verify.problem import Problem
from epfuse.verify.record import CaseResult, VerifyRecord
from epfuse.verify.scenarios import KINDS, Scenario, draw_scenario, make_scenarios
from epfuse.verify.subject import Stored, Subject
from epfuse.verify.suite import add_rank, poisoned_memory, repeats, tolerance_of
from epfuse.weights.experts import ExpertWeights

REPLAYS = 200
"""Routings that a captured graph is replayed with."""
PLACEMENTS = {"contiguous": ExpertPlacement.contiguous, "strided": ExpertPlacement.strided}


@dataclass
class RankCase(CaseResult):
    """One scenario on one path, summed in one way, over all ranks.

    Attributes:
        placement: a name in `PLACEMENTS`.
        exchange: how tokens and results travelled.
        digest: of the bits, where every rank has the same result; equal in two runs of one commit on one machine.
    """

    placement: str = ""
    exchange: str = ""
    digest: str = ""

    def to_json(self) -> dict[str, Any]:
        """As `CaseResult`."""
        values = super().to_json()
        if not self.digest:
            del values["digest"]
        return values


@dataclass(frozen=True)
class Way:
    """One exchange mode, for one token count.

    Attributes:
        name: for the record.
        mode: the exchange.
        passed: the rows that this rank passes.
        got: the rows that it gets.
        sums: how often the sum over ranks rounds.
        everywhere: whether every rank gets the same.
        captured: whether a graph can hold it.
    """

    name: str
    mode: Exchange
    passed: slice
    got: slice
    sums: int
    everywhere: bool = False
    captured: bool = True


def steps_of(problem: Problem, subjects: tuple[Subject, ...]) -> int:
    """How often `run` calls ``advance``."""
    return len(PLACEMENTS) * len(subjects) * len(problem.tokens) * len(KINDS)


def run(
    context: RankContext,
    problem: Problem,
    subjects: tuple[Subject, ...],
    advance: Callable[[], None] = lambda: None,
    replays: int = REPLAYS,
) -> VerifyRecord:
    """Verify ``subjects`` over the ranks of ``context``; every rank calls it, and every rank gets the whole record.

    Args:
        context: this rank; ``problem.ep_size`` ranks on ``problem.device``.
        problem: sizes, device, seed; the same on every rank but for the device.
        subjects: from `epfuse.verify.subject.subjects_of`; the same on every rank.
        advance: called after each scenario of each subject.
        replays: routings that each captured graph is replayed with, on a GPU.

    Raises:
        RanksDisagree: a rank was started with something else.
    """
    facts = {name: str(value) for name, value in asdict(problem).items() if name != "device"}
    names = ", ".join(str(subject) for subject in subjects)
    check_agreement(context.group, facts | {"subjects": names, "target": problem.target.value})
    cases: list[RankCase] = []
    for stored in Stored:
        alike = [subject for subject in subjects if subject.stored is stored]
        if alike:
            cases += _run_alike(context, problem, stored, alike, advance, replays)
    return VerifyRecord(problem, list(_merged(context.group, cases)))


def _run_alike(
    context: RankContext,
    problem: Problem,
    stored: Stored,
    subjects: list[Subject],
    advance: Callable[[], None],
    replays: int,
) -> list[RankCase]:
    draw = dense_weights if stored is Stored.DENSE else mxfp8_weights
    group, cases = context.group, list[RankCase]()
    on_gpu = problem.device.type == "cuda"
    others = {tokens: _other_routings(problem, tokens, replays) for tokens in problem.tokens if on_gpu}
    placements = {name: make(problem.experts, group.size) for name, make in PLACEMENTS.items()}
    drawn = make_scenarios(problem)
    scenarios = {name: [_placed(s, placement) for s in drawn] for name, placement in placements.items()}
    unsharded = _unsharded(problem, draw, [s for placed in scenarios.values() for s in placed])
    for name, placement in placements.items():
        source = draw(problem, placement.held[group.rank])
        expert_map = placement.expert_map(group.rank, problem.device)
        agree_on_layer(group, source, expert_map, {}, placement)
        for subject in subjects:
            weights = in_format(source, subject.form, problem.target)
            experts, payload = share_of(problem, weights, expert_map, subject), payload_for(subject.path, weights)
            for scenario in scenarios[name]:
                oracle = unsharded[id(scenario)]
                for way in ways(group, placement, uneven(scenario.tokens, group.size), payload):
                    case = _case(problem, subject, scenario, name, way)
                    _check(context, case, scenario, way, experts, subject, oracle)
                    cases.append(case)
                advance()
            if subject.path is Path.REFERENCE:  # syncs with the device by design
                continue
            for tokens, routings in others.items():
                placed = [_placed(scenario, placement) for scenario in routings]
                for way in ways(group, placement, uneven(tokens, group.size), payload):
                    if way.captured and (way.everywhere or tokens == max(problem.tokens)):
                        case = _case(problem, subject, replace(placed[0], name="graph replay"), name, way)
                        case.tolerance = None
                        _check_replays(context, case, placed, way, experts, subject)
                        cases.append(case)
    return cases


def uneven(tokens: int, ranks: int) -> list[int]:
    """Each rank's own tokens: the last rank has half of them, and some may have none."""
    counts = [0] * ranks
    counts[-1] = tokens - tokens // 2
    for token in range(tokens // 2):
        counts[token % max(1, ranks - 1)] += 1
    return counts


def ways(group: EPGroup, placement: ExpertPlacement, counts: list[int], payload: Payload) -> list[Way]:
    """Every exchange mode; ``counts`` are each rank's own tokens, where a mode has them."""
    tokens = sum(counts)
    room, first = max(counts), sum(counts[: group.rank])
    own, every = slice(first, first + counts[group.rank]), slice(0, tokens)
    part = SequenceParallel(group).rows_of(tokens)
    some, rounded = slice(part.start, part.stop), group.size - 1
    return [
        Way("all_reduce float32", Replicated(group), every, every, 1, everywhere=True),
        Way("all_reduce partials", Replicated(group, SumIn.PARTIALS), every, every, rounded, everywhere=True),
        Way("reduce_scatter", SequenceParallel(group), every, some, 1),
        Way("all_gather", AllGather(group, room, payload=payload), own, own, 1),
        Way("dispatch", Dispatch(group, placement, room, payload), own, own, 1),
        Way(
            "compact dispatch",
            CompactDispatch(group, placement, room, -(-room // 2), payload),
            own,
            own,
            1,
            captured=False,
        ),
    ]


def _placed(scenario: Scenario, placement: ExpertPlacement) -> Scenario:
    """The scenario with the experts of each rank in place of those that a contiguous placement gives it."""
    order = torch.tensor([expert for own in placement.held for expert in own], device=scenario.topk_ids.device)
    ids = scenario.topk_ids
    real = (ids >= 0) & (ids < len(order))
    placed = torch.where(real, order[torch.where(real, ids, 0).long()].to(ids.dtype), ids)
    return replace(scenario, topk_ids=placed)


def _unsharded(
    problem: Problem, draw: Callable[[Problem, Sequence[int]], ExpertWeights], scenarios: list[Scenario]
) -> dict[int, torch.Tensor]:
    """By the scenario's identity, the float64 layer."""
    totals = {id(s): torch.zeros_like(s.hidden, dtype=torch.float64) for s in scenarios}
    for expert in range(problem.experts):
        one = draw(problem, [expert])
        for scenario in scenarios:
            add_rank(totals[id(scenario)], expert, one, scenario, problem.activation)
    return totals


def share_of(problem: Problem, weights: ExpertWeights, expert_map: ExpertMap, subject: Subject) -> Experts:
    """What a rank's experts make of rows, as exchange modes call it.

    Args:
        problem: its activation counts.
        weights: the rank's.
        expert_map: which experts these are.
        subject: how they are computed.
    """

    def share(hidden: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        return fused_experts(
            hidden,
            weights,
            topk_weights,
            topk_ids,
            expert_map,
            activation=problem.activation,
            path=subject.path,
            combine=subject.combine,
        )

    return share


def _case(problem: Problem, subject: Subject, scenario: Scenario, placement: str, way: Way) -> RankCase:
    return RankCase(
        scenario.name,
        subject.path.value,
        subject.form.value,
        subject.combine.value,
        scenario.tokens,
        tolerance_of(problem, subject, scenario, way.sums),
        placement=placement,
        exchange=way.name,
    )


def _call(way: Way, scenario: Scenario, experts: Experts) -> torch.Tensor:
    rows = way.passed
    return way.mode(scenario.hidden[rows], scenario.topk_weights[rows], scenario.topk_ids[rows], experts)


def _check(
    context: RankContext,
    case: RankCase,
    scenario: Scenario,
    way: Way,
    experts: Experts,
    subject: Subject,
    oracle: torch.Tensor,
) -> None:
    """Two runs, the first into poisoned memory: right, and repeatable; the same bits wherever it is the same sum."""
    with poisoned_memory():
        result = _call(way, scenario, experts)
    again = _call(way, scenario, experts)
    settle(context)
    case.judge(compare(result, oracle[way.got]), "sum over ranks")
    if not repeats(subject, result, again):
        case.failures.append("two runs differ")
    if way.everywhere:
        data = result.contiguous().view(torch.uint8).cpu().numpy().tobytes()
        case.digest = hashlib.sha256(data).hexdigest()


def _check_replays(
    context: RankContext, case: RankCase, scenarios: list[Scenario], way: Way, experts: Experts, subject: Subject
) -> None:
    """Capture one call, its collectives included; replays with other routings must equal eager calls bit for bit."""
    first = scenarios[0]
    static = replace(
        first,
        hidden=first.hidden.clone(),
        topk_weights=first.topk_weights.clone(),
        topk_ids=first.topk_ids.long(),  # wide enough for every scenario's
    )
    _call(way, static, experts)  # compiles, and opens connections, outside of the capture
    settle(context)
    graph = torch.cuda.CUDAGraph()
    # other threads may go on asking the driver: torch.distributed's, and the guard's
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = _call(way, static, experts)
    for index, scenario in enumerate(scenarios):
        static.hidden.copy_(scenario.hidden)
        static.topk_weights.copy_(scenario.topk_weights)
        static.topk_ids.copy_(scenario.topk_ids)
        captured.fill_(torch.nan)
        graph.replay()
        eager = _call(way, static, experts)
        settle(context)
        if not repeats(subject, captured, eager):
            case.failures.append(f"replay {index} with {scenario.name!r} differs from the eager call")


def _other_routings(problem: Problem, tokens: int, count: int) -> list[Scenario]:
    """Scenarios of all kinds in turn, with a routing each; scenarios of one kind share their activations."""
    kinds, narrow = list(KINDS), replace(problem, hidden=LEAST_SIZE)
    wide = {kind: draw_scenario(problem, tokens, kind, problem.seed).hidden for kind in kinds}
    return [
        replace(draw_scenario(narrow, tokens, kind, problem.seed + 1 + index), hidden=wide[kind])
        for index, kind in ((index, kinds[index % len(kinds)]) for index in range(count))
    ]


def settle(context: RankContext) -> None:
    """Let the host wait for what it has launched, where the other ranks' guards can see that it waits."""
    if context.device.type == "cuda":
        with context.group.waiting():
            torch.cuda.synchronize(context.device)


def _merged(group: EPGroup, cases: list[RankCase]) -> list[RankCase]:
    """Each case with the worst rank's figures, every rank's failures, and whether the ranks have the same bits."""
    own = [[case.snr_db, case.max_error, case.relative_error, case.failures, case.digest] for case in cases]
    every = [json.loads(text) for text in gather_text(group, json.dumps(own))]
    for index, case in enumerate(cases):
        told = [of_rank[index] for of_rank in every]
        case.snr_db = min(one[0] for one in told)
        case.max_error, case.relative_error = (max(one[place] for one in told) for place in (1, 2))
        case.failures = [f"rank {rank}: {failure}" for rank, one in enumerate(told) for failure in one[3]]
        if len({one[4] for one in told}) > 1:
            case.failures.append("the ranks' results are not the same bits")
            case.digest = ""
    return cases
