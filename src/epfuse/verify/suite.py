"""Run the suite: rank by rank, every scenario on every path against the oracles."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from epfuse.api import fused_experts
from epfuse.config import Activation, Combine, Path
from epfuse.expert_map import ExpertMap
from epfuse.policy import FP8_PATHS
from epfuse.reference import run_reference
from epfuse.verify.budget import Tolerance, after_sums, compare, dense_tolerance, fp8_tolerance
from epfuse.verify.experts import in_format, rank_mxfp8, rank_weights
from epfuse.verify.oracle import add_experts, plain_numbers
from epfuse.verify.problem import Problem
from epfuse.verify.record import ORACLE, CaseResult, VerifyRecord
from epfuse.verify.scenarios import KINDS, OUTLIER, Scenario, make_scenarios
from epfuse.verify.subject import Stored, Subject
from epfuse.weights.experts import ExpertWeights

ORACLE_TOLERANCE = Tolerance(snr_db=200.0, max_error=1e-9, relative_error=1e-10)
"""Between the two float64 oracles, whose sums run in different orders."""

TRUE_SIZE_LIMITS = {Path.W8A16: 4e-3, Path.W8A8: 5.5e-2}
"""Relative error that a call at MiniMax-M3's true size must stay below, whatever the derived budget allows: of a rank's
share, before shares are added (`epfuse.verify.budget.after_sums`)."""

ATOMIC_LIMIT = 1.5
"""Error of the sum by atomics over that of the deterministic one."""


def steps_of(problem: Problem, subjects: tuple[Subject, ...]) -> int:
    """How often `run` calls ``advance``."""
    return len(_kinds_stored(subjects)) * problem.ep_size * len(problem.tokens) * len(KINDS)


def least_bytes(problem: Problem, subjects: tuple[Subject, ...]) -> int:
    """What `run` holds at the least, in bytes: one rank's weights, and every scenario's activations and sums."""
    weights = 3 * problem.hidden * problem.intermediate * problem.local_experts
    each = 2 * problem.hidden + 8 * problem.hidden * (2 + len(subjects)) + 8 * problem.top_k
    return weights + sum(problem.tokens) * len(KINDS) * each


def run(
    problem: Problem,
    subjects: tuple[Subject, ...],
    advance: Callable[[], None] = lambda: None,
    scenarios: list[Scenario] | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> VerifyRecord:
    """Verify ``subjects``: on each rank, each scenario against the float64 oracle; then the sum over the ranks.

    Holds one rank's weights at a time, in the formats of the subjects that share an oracle, and per scenario its
    inputs and ``2 + len(subjects)`` float64 sums ``[T, H]``.

    Args:
        problem: sizes, device, seed.
        subjects: from `subjects_of`; the device must be able to run them.
        advance: called after each scenario of each rank.
        scenarios: None for all of the problem.
        say: called with what begins, where it may take seconds.
    """
    scenarios = make_scenarios(problem) if scenarios is None else scenarios
    cases = []
    for stored in _kinds_stored(subjects):
        alike = [subject for subject in subjects if subject.stored is stored]
        cases += _run_alike(problem, stored, alike, scenarios, advance, say)
    return VerifyRecord(problem, cases)


def _kinds_stored(subjects: tuple[Subject, ...]) -> list[Stored]:
    return [stored for stored in Stored if any(subject.stored is stored for subject in subjects)]


def _run_alike(
    problem: Problem,
    stored: Stored,
    subjects: list[Subject],
    scenarios: list[Scenario],
    advance: Callable[[], None],
    say: Callable[[str], None],
) -> list[CaseResult]:
    """`run` for subjects whose weights are made from the same ones."""
    activation = problem.activation
    oracles = [
        CaseResult(s.name, ORACLE, stored.value, Combine.DETERMINISTIC.value, s.tokens, ORACLE_TOLERANCE)
        for s in scenarios
    ]
    cases = {subject: [_case(problem, subject, s) for s in scenarios] for subject in subjects}
    replays: list[CaseResult] = []
    sums = {subject: [_zeros(s) for s in scenarios] for subject in subjects}
    oracle_sums = [_zeros(s) for s in scenarios]
    unsharded = [_zeros(s) for s in scenarios]
    for rank in range(problem.ep_size):
        say(f"{stored.value} weights of rank {rank}")
        source = (rank_weights if stored is Stored.DENSE else rank_mxfp8)(problem, rank)
        weights = {subject: in_format(source, subject.form, problem.target) for subject in subjects}
        expert_map = ExpertMap.contiguous(problem.experts, problem.ep_size, rank, problem.device)
        say(f"rank {rank} of {problem.ep_size}")
        for index, scenario in enumerate(scenarios):
            inputs = (scenario.hidden, source, scenario.topk_weights, scenario.topk_ids, expert_map, activation)
            oracle = run_reference(*inputs, compute=torch.float64)
            oracle_sums[index] += oracle
            add_rank(unsharded[index], rank * problem.local_experts, source, scenario, activation)
            for subject in subjects:
                case = cases[subject][index]
                result = _check_rank(
                    case, scenario, weights[subject], expert_map, subject, oracle, activation, f"rank {rank}"
                )
                sums[subject][index] += result
            advance()
        if rank == 0 and problem.device.type == "cuda":
            replays = [
                _check_replay(
                    [s for s in scenarios if s.tokens == tokens], weights[subject], expert_map, subject, activation
                )
                for subject in subjects
                if subject.path is not Path.REFERENCE  # syncs with the device by design
                for tokens in problem.tokens
            ]
    for index, case in enumerate(oracles):
        case.judge(compare(oracle_sums[index], unsharded[index]), "sum of the rank oracles")
    for subject in subjects:
        for index, case in enumerate(cases[subject]):
            case.judge(compare(sums[subject][index], unsharded[index]), "sum over ranks")
    _judge_atomics(cases)
    return [*oracles, *(case for subject in subjects for case in cases[subject]), *replays]


def _case(problem: Problem, subject: Subject, scenario: Scenario) -> CaseResult:
    """The case of a subject and a scenario, with the tolerance that it must meet."""
    return CaseResult(
        scenario.name,
        subject.path.value,
        subject.form.value,
        subject.combine.value,
        scenario.tokens,
        tolerance_of(problem, subject, scenario),
    )


def tolerance_of(problem: Problem, subject: Subject, scenario: Scenario, sums: int = 0) -> Tolerance:
    """What a subject's result must reach.

    Args:
        problem: its sizes.
        subject: its path.
        scenario: its inputs.
        sums: roundings to the problem's dtype after the layer's own, in the sum over ranks.
    """
    if subject.path in FP8_PATHS:
        tolerance = fp8_tolerance()
    else:
        tolerance = dense_tolerance(problem.dtype, problem.hidden, problem.intermediate, sums)
    limit = TRUE_SIZE_LIMITS.get(subject.path) if problem.has_true_size else None
    if limit is not None and not (subject.path in FP8_PATHS and scenario.name == OUTLIER):
        # the rounding of one number that outweighs its row to E4M3 does not average out
        tolerance = replace(tolerance, relative_error=after_sums(limit, problem.dtype, sums))
    return tolerance


def _judge_atomics(cases: dict[Subject, list[CaseResult]]) -> None:
    """Sums by atomics are not much worse than the same path's deterministic ones."""
    for subject, atomic in cases.items():
        fixed = cases.get(replace(subject, combine=Combine.DETERMINISTIC))
        if subject.combine is not Combine.ATOMIC or fixed is None:
            continue
        for ours, theirs in zip(atomic, fixed, strict=True):
            if not ours.relative_error <= ATOMIC_LIMIT * theirs.relative_error:
                ours.failures.append(
                    f"relative error {ours.relative_error:.2g} is over {ATOMIC_LIMIT} times the deterministic sum's"
                    f" {theirs.relative_error:.2g}"
                )


def add_rank(
    total: torch.Tensor, first_expert: int, source: ExpertWeights, scenario: Scenario, activation: Activation
) -> None:
    """Add a rank's experts to the unsharded layer's second oracle.

    Args:
        total: ``[T, H]`` float64, added to.
        first_expert: the global id of the rank's first one.
        source: the rank's weights, dense or MXFP8, with their biases.
        scenario: of the whole layer: T tokens and their routes to all E experts.
        activation: between the projections.
    """
    dense, packed = source.dense_experts, source.mxfp8_experts
    if dense is not None:
        add_experts(total, first_expert, dense.w13, dense.w2, scenario, activation, **dict(source.biases))
        return
    assert packed is not None
    for slot in range(source.local_experts):
        if bool((scenario.topk_ids == first_expert + slot).any()):
            w13, w2 = (plain_numbers(stack[slot])[None] for stack in (packed.w13, packed.w2))
            own = {name: bias[slot : slot + 1] for name, bias in source.biases}
            add_experts(total, first_expert + slot, w13, w2, scenario, activation, **own)


def _zeros(scenario: Scenario) -> torch.Tensor:
    return torch.zeros_like(scenario.hidden, dtype=torch.float64)


def _check_rank(
    case: CaseResult,
    scenario: Scenario,
    weights: ExpertWeights,
    expert_map: ExpertMap,
    subject: Subject,
    oracle: torch.Tensor,
    activation: Activation,
    where: str,
) -> torch.Tensor:
    """Two runs, the first into poisoned memory: right, and repeatable. Returns the first one's result."""

    def call(out: torch.Tensor | None) -> torch.Tensor:
        return fused_experts(
            scenario.hidden,
            weights,
            scenario.topk_weights,
            scenario.topk_ids,
            expert_map,
            activation=activation,
            path=subject.path,
            combine=subject.combine,
            out=out,
        )

    with poisoned_memory():
        result = call(torch.full_like(scenario.hidden, torch.nan))
    case.judge(compare(result, oracle), where)
    if not repeats(subject, result, call(None)):
        case.failures.append(f"{where}: two runs differ")
    return result


def _check_replay(
    scenarios: list[Scenario],
    weights: ExpertWeights,
    expert_map: ExpertMap,
    subject: Subject,
    activation: Activation,
) -> CaseResult:
    """Capture the first scenario in a graph; its replays with the other routings must equal eager calls."""
    first = scenarios[0]
    names = (subject.path.value, subject.form.value, subject.combine.value)
    case = CaseResult("graph replay", *names, first.tokens, None)
    hidden, topk_weights = first.hidden.clone(), first.topk_weights.clone()
    topk_ids = first.topk_ids.long()  # wide enough for every scenario's
    operands = (hidden, weights, topk_weights, topk_ids, expert_map)
    call = partial(fused_experts, *operands, activation=activation, path=subject.path, combine=subject.combine)
    call()  # compiles, outside of the capture
    torch.cuda.synchronize(hidden.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for scenario in scenarios:
        hidden.copy_(scenario.hidden)
        topk_weights.copy_(scenario.topk_weights)
        topk_ids.copy_(scenario.topk_ids)
        captured.fill_(torch.nan)
        graph.replay()
        if not repeats(subject, captured, call()):
            case.failures.append(f"replay with {scenario.name!r} differs from the eager call")
    return case


def repeats(subject: Subject, first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal bit for bit; sums by atomics, in FP32 and in any order, up to one rounding of the result."""
    if subject.combine is Combine.DETERMINISTIC:
        return same_bits(first, second)
    return compare(second, first.double()).relative_error <= torch.finfo(first.dtype).eps


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality that does not mind NaN and tells 0.0 from -0.0."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN (integers: their maximum), so that a value never written shows.

    torch does so while deterministic algorithms are asked for
    (torch.utils.deterministic.fill_uninitialized_memory, on by default).
    """
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of operations that have no deterministic algorithm
            yield
    finally:
        torch.set_deterministic_debug_mode(mode)
