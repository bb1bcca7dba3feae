"""Run a benchmark: roofs first, then at every point each contender's correctness, and then its time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import torch

from epfuse.bench.contender import Contender
from epfuse.bench.inputs import Inputs, cache_bytes_of, draw_inputs, rotated_bytes
from epfuse.bench.layers import Layer
from epfuse.bench.measure import Sampling, time_calls
from epfuse.bench.peers.find import describe
from epfuse.bench.record import BenchRow
from epfuse.bench.roofline import Roofs, floor_of
from epfuse.bench.routing import Routing
from epfuse.bench.weights import LayerWeights
from epfuse.target import on_device
from epfuse.verify.budget import Difference, compare
from epfuse.verify.suite import poisoned_memory


@dataclass(frozen=True)
class BenchPlan:
    """What to measure.

    Attributes:
        layer: the layer.
        tokens: counts T.
        routings: each with every token count.
        device: where.
        seed: of weights, activations and routings.
        sampling: how much.
    """

    layer: Layer
    tokens: tuple[int, ...]
    routings: tuple[Routing, ...]
    device: torch.device
    seed: int
    sampling: Sampling

    @property
    def points(self) -> list[tuple[Routing, int]]:
        """Routings and token counts, in the order in which they are measured."""
        return [(routing, tokens) for routing in self.routings for tokens in self.tokens]


def run_points(
    plan: BenchPlan,
    weights: LayerWeights,
    contenders: Sequence[Contender],
    roofs: Roofs,
    advance: Callable[[str], None] = lambda what: None,
) -> Iterator[list[BenchRow]]:
    """The rows of one point after the other.

    At a point all contenders run on the same inputs, one after another, so that what changes slowly (clocks,
    temperature) is the same for all.

    Args:
        plan: what to measure.
        weights: shared by the contenders and the oracle.
        contenders: paths and peers.
        roofs: of this device.
        advance: called with what is about to be measured.
    """
    cache = cache_bytes_of(plan.device)
    with on_device(plan.device):
        for routing, tokens in plan.points:
            drawn = draw_inputs(plan.layer, routing, tokens, plan.seed, plan.device, cache)
            oracles = [weights.oracle(inputs) for inputs in drawn]
            rows = []
            for contender in contenders:
                advance(f"T={tokens} {routing}, {contender.name}")
                empty = _row_without_time(plan, contender, routing, drawn, roofs)
                rows.append(_measure(contender, drawn, oracles, plan, empty))
            yield rows


def _measure(
    contender: Contender, drawn: list[Inputs], oracles: list[torch.Tensor], plan: BenchPlan, empty: BenchRow
) -> BenchRow:
    """``empty`` with an error and a time, or with what went wrong."""
    try:
        with poisoned_memory():  # outputs and workspaces too; the first call also compiles
            calls = [contender.bind(inputs) for inputs in drawn]
            checked = _worst(zip([call() for call in calls], oracles, strict=True))
        row = replace(empty, relative_error=checked.relative_error)
        if not checked.within(contender.tolerance):
            return replace(row, wrong=True, failure=_wrong("the result", checked, contender))
        measured = time_calls(calls, plan.device, plan.sampling, contender.method)
        timed = _worst(zip(measured.outputs, oracles, strict=True))
        if not timed.within(contender.tolerance):
            return replace(row, wrong=True, failure=_wrong("the timed calls' result", timed, contender))
    except torch.OutOfMemoryError:
        return replace(empty, failure=f"{plan.device} is out of memory")
    except Exception as error:  # a kernel that fails costs its own row, not the run
        return replace(empty, failure=describe(error))
    return replace(row, relative_error=max(checked.relative_error, timed.relative_error), time=measured.timing)


def _worst(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Difference:
    differences = [compare(result, oracle) for result, oracle in pairs]
    return Difference(
        min(difference.snr_db for difference in differences),
        max(difference.max_error for difference in differences),
        max(difference.relative_error for difference in differences),
    )


def _wrong(what: str, found: Difference, contender: Contender) -> str:
    """What is wrong, with every figure that breaks its limit."""
    limits, parts = contender.tolerance, []
    if not found.relative_error <= limits.relative_error:
        parts.append(f"relative error {found.relative_error:.2g}, at most {limits.relative_error:.2g}")
    if not found.snr_db >= limits.snr_db:
        parts.append(f"worst token {found.snr_db:.1f} dB, at least {limits.snr_db:.1f}")
    if not found.max_error <= limits.max_error:
        parts.append(f"worst element {found.max_error:.2g}, at most {limits.max_error:.2g}")
    return f"{what} is wrong: {'; '.join(parts)}"


def _row_without_time(
    plan: BenchPlan, contender: Contender, routing: Routing, drawn: list[Inputs], roofs: Roofs
) -> BenchRow:
    works = [inputs.work(plan.layer, contender.form, contender.operand) for inputs in drawn]
    floors = [floor_of(work, roofs) for work in works]
    return BenchRow(
        contender=contender.name,
        weights=contender.weights,
        kind=contender.kind,
        routing=str(routing),
        tokens=drawn[0].tokens,
        rows=mean(inputs.rows for inputs in drawn),
        active_experts=mean(len(inputs.active) for inputs in drawn),
        weight_bytes=mean(work.weight_bytes for work in works),
        flops=mean(work.flops for work in works),
        # the time is the mean over the calls in turn, and so is its floor
        floor_us=1e6 * mean(floor.seconds for floor in floors),
        floor_bound=max(floors, key=lambda floor: floor.seconds).bound,
        variants=len(drawn),
        rotated_bytes=rotated_bytes(drawn, plan.layer, contender.form),
        error_limit=contender.tolerance.relative_error,
        block_m=contender.block_m(drawn[0].tokens),
    )
