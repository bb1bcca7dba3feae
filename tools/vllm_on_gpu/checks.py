"""Whether experts are right inside vLLM's interface: eager, in a graph, and in that graph with other inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from tools.vllm_on_gpu.kernels import ExpertsCandidate
from vllm.v1.worker import workspace

from epfuse.bench.contender import ContenderKind
from epfuse.bench.inputs import Inputs
from epfuse.bench.measure import Call, captured
from epfuse.bench.weights import LayerWeights
from epfuse.verify.budget import compare

Run = Callable[[], object]


@dataclass(frozen=True)
class OracleCheck:
    """One comparison with the float64 oracle.

    Attributes:
        experts: whose.
        tokens: T.
        what: how it was called.
        relative_error: norm of the error over the oracle's; None if the call failed.
        limit: what it may be.
        ok: whether every figure of the tolerance was reached.
        failure: what was raised, or found besides.
    """

    experts: str
    tokens: int
    what: str
    relative_error: float | None
    limit: float
    ok: bool
    failure: str | None = None


def poison_workspaces() -> None:
    """Fill vLLM's workspaces with bytes that are NaN in BF16, as another layer might leave them."""
    for memory in workspace.current_workspace_manager()._current_workspaces:
        if memory is not None:
            memory.fill_(0xFF)


def reserve_workspaces(candidates: Sequence[ExpertsCandidate], inputs: Inputs) -> None:
    """Call everyone with the most tokens, then lock the workspaces, as vLLM does after its warm-up."""
    for candidate in candidates:
        candidate.kernel.call(inputs.hidden, inputs.topk_weights, inputs.topk_ids)
    workspace.lock_workspace()


def repeatable(call: Call, device: torch.device) -> tuple[Run, torch.Tensor]:
    """What repeats ``call``, and where its result lies: in a graph, or where there is none from Python."""
    if device.type == "cuda":
        once = captured([call], 1, device)
        return once.run, once.outputs()[0]
    output = call()
    return lambda: output.copy_(call()), output


@dataclass(frozen=True)
class OracleCase:
    """A call's inputs and what they should give.

    Attributes:
        inputs: of the call.
        expected: ``[T, H]`` float64.
    """

    inputs: Inputs
    expected: torch.Tensor


@dataclass(frozen=True)
class Cases:
    """What one token count is checked with.

    Attributes:
        first: what the graph is captured with.
        other: another routing and other activations.
        padded: as ``other``, the second half of the tokens without experts (id -1), as vLLM 0.33 pads; None for T = 1.
    """

    first: OracleCase
    other: OracleCase
    padded: OracleCase | None

    @classmethod
    def of(cls, drawn: Sequence[Inputs], weights: LayerWeights) -> Cases:
        """From two inputs of equal T."""
        first, other = (OracleCase(inputs, weights.oracle(inputs)) for inputs in drawn[:2])
        if other.inputs.tokens == 1:
            return cls(first, other, None)
        ids = other.inputs.topk_ids.clone()
        ids[other.inputs.tokens // 2 :] = -1
        padded = replace(other.inputs, topk_ids=ids)
        return cls(first, other, OracleCase(padded, weights.oracle(padded)))


def check_candidate(candidate: ExpertsCandidate, cases: Cases) -> list[OracleCheck]:
    """One class at one token count; workspaces and results hold NaN before every call.

    Args:
        candidate: the class.
        cases: its inputs.
    """
    first = cases.first.inputs
    static = [tensor.clone() for tensor in (first.hidden, first.topk_weights, first.topk_ids)]
    found: list[OracleCheck] = []

    def judge(what: str, case: OracleCase, output: torch.Tensor) -> None:
        difference = compare(output, case.expected)
        ok = difference.within(candidate.tolerance)
        found.append(_check(candidate, first.tokens, what, ok, difference.relative_error))

    def replay(what: str, case: OracleCase, run: Run, output: torch.Tensor) -> None:
        given = (case.inputs.hidden, case.inputs.topk_weights, case.inputs.topk_ids)
        for tensor, new in zip(static, given, strict=True):
            tensor.copy_(new)
        poison_workspaces()
        output.fill_(torch.nan)
        run()
        judge(what, case, output)

    try:
        poison_workspaces()
        eager = candidate.kernel.call(*static).clone()
        judge("eager", cases.first, eager)
        run, output = repeatable(lambda: candidate.kernel.call(*static), first.hidden.device)
        replay("replay", cases.first, run, output)
        if candidate.kind is ContenderKind.PATH and not torch.equal(output, eager):
            found.append(_check(candidate, first.tokens, "replay", False, None, "other bits than eager"))
        replay("replay, other routing", cases.other, run, output)
        if (
            candidate.kind is ContenderKind.PATH and cases.padded is not None
        ):  # 0.25.1's own kernels do not take ids of -1
            replay("replay, padding rows", cases.padded, run, output)
    except Exception as error:  # a record of what failed is worth more than a traceback
        text = str(error).splitlines()
        found.append(_check(candidate, first.tokens, "call", False, None, f"{type(error).__name__}: {text[:1]}"))
    return found


def _check(
    candidate: ExpertsCandidate, tokens: int, what: str, ok: bool, error: float | None, failure: str | None = None
) -> OracleCheck:
    finite = error if error is not None and error < float("inf") else None
    return OracleCheck(candidate.label, tokens, what, finite, candidate.tolerance.relative_error, ok, failure)
