"""Run the suite: rank by rank, every scenario on every path against the oracles."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from epfuse.api import fused_experts
from epfuse.config import Path, SwiGLUOAI, WeightFormat
from epfuse.expert_map import ExpertMap
from epfuse.pipeline import run_reference
from epfuse.verify.budget import Tolerance, compare, dense_tolerance
from epfuse.verify.experts import rank_weights
from epfuse.verify.oracle import add_experts
from epfuse.verify.problem import Problem
from epfuse.verify.record import ORACLE, CaseResult, Record
from epfuse.verify.scenarios import KINDS, Scenario, make_scenarios
from epfuse.weights.experts import ExpertWeights

ORACLE_TOLERANCE = Tolerance(snr_db=200.0, max_error=1e-9)
"""Between the two float64 oracles, whose sums run in different orders."""


def steps_of(problem: Problem) -> int:
    """How often `run` calls ``advance``."""
    return problem.ep_size * len(problem.tokens) * len(KINDS)


def run(problem: Problem, paths: tuple[Path, ...], advance: Callable[[], None] = lambda: None) -> Record:
    """Verify ``paths``: on each rank, each scenario against the float64 oracle; then the sum over the ranks.

    Holds one rank's weights at a time, and per scenario its inputs and ``2 + len(paths)`` float64 sums ``[T, H]``.

    Args:
        problem: sizes, device, seed.
        paths: none of them AUTO; the device must be able to run them.
        advance: called after each scenario of each rank.
    """
    activation = SwiGLUOAI()
    scenarios = make_scenarios(problem)
    tolerance = dense_tolerance(problem.dtype, problem.hidden, problem.intermediate)
    oracles = [CaseResult(s.name, ORACLE, s.tokens, ORACLE_TOLERANCE) for s in scenarios]
    cases = {path: [CaseResult(s.name, path.value, s.tokens, tolerance) for s in scenarios] for path in paths}
    replays: list[CaseResult] = []
    sums = {path: [_zeros(s) for s in scenarios] for path in paths}
    oracle_sums = [_zeros(s) for s in scenarios]
    unsharded = [_zeros(s) for s in scenarios]
    for rank in range(problem.ep_size):
        weights = rank_weights(problem, rank)
        dense = weights.kept[WeightFormat.DENSE]
        assert isinstance(dense.w13, torch.Tensor)
        assert isinstance(dense.w2, torch.Tensor)
        expert_map = ExpertMap.contiguous(problem.experts, problem.ep_size, rank, problem.device)
        for index, scenario in enumerate(scenarios):
            inputs = (scenario.hidden, weights, scenario.topk_weights, scenario.topk_ids, expert_map, activation)
            oracle = run_reference(*inputs, compute=torch.float64)
            oracle_sums[index] += oracle
            first = rank * problem.local_experts
            add_experts(unsharded[index], first, dense.w13, dense.w2, scenario, activation)
            for path in paths:
                result = _check_rank(cases[path][index], scenario, weights, expert_map, path, oracle, f"rank {rank}")
                sums[path][index] += result
            advance()
        if rank == 0 and problem.device.type == "cuda":
            replays = [
                _check_replay([s for s in scenarios if s.tokens == tokens], weights, expert_map, path)
                for path in paths
                if path is not Path.REFERENCE  # syncs with the device by design
                for tokens in problem.tokens
            ]
    for index, case in enumerate(oracles):
        case.judge(compare(oracle_sums[index], unsharded[index]), "sum of the rank oracles")
    for path in paths:
        for index, case in enumerate(cases[path]):
            case.judge(compare(sums[path][index], unsharded[index]), "sum over ranks")
    return Record(problem, [*oracles, *(case for path in paths for case in cases[path]), *replays])


def _zeros(scenario: Scenario) -> torch.Tensor:
    return torch.zeros_like(scenario.hidden, dtype=torch.float64)


def _check_rank(
    case: CaseResult,
    scenario: Scenario,
    weights: ExpertWeights,
    expert_map: ExpertMap,
    path: Path,
    oracle: torch.Tensor,
    where: str,
) -> torch.Tensor:
    """Two runs, the first into poisoned memory: right, and equal bit for bit. Returns the first one's result."""

    def call(out: torch.Tensor | None) -> torch.Tensor:
        return fused_experts(
            scenario.hidden, weights, scenario.topk_weights, scenario.topk_ids, expert_map, path=path, out=out
        )

    with poisoned_memory():
        result = call(torch.full_like(scenario.hidden, torch.nan))
    case.judge(compare(result, oracle), where)
    if not same_bits(result, call(None)):
        case.failures.append(f"{where}: two runs differ")
    return result


def _check_replay(scenarios: list[Scenario], weights: ExpertWeights, expert_map: ExpertMap, path: Path) -> CaseResult:
    """Capture the first scenario in a graph; its replays with the other routings must equal eager calls."""
    first = scenarios[0]
    case = CaseResult("graph replay", path.value, first.tokens, None)
    hidden, topk_weights = first.hidden.clone(), first.topk_weights.clone()
    topk_ids = first.topk_ids.long()  # wide enough for every scenario's

    def call() -> torch.Tensor:
        return fused_experts(hidden, weights, topk_weights, topk_ids, expert_map, path=path)

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
        if not same_bits(captured, call()):
            case.failures.append(f"replay with {scenario.name!r} differs from the eager call")
    return case


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
