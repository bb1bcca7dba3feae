"""What the gate executes: layers, routings, shards and budgets, each a case that runs by itself in any process."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from epfuse.aot.isa.device import executing
from epfuse.aot.isa.edges import TARGET, Gemm, unseen
from epfuse.aot.isa.errors import IsaError
from epfuse.aot.isa.expected import compare, expected, mismatches, same
from epfuse.aot.isa.kept import Kept
from epfuse.aot.isa.layers import EXACT, Exact
from epfuse.aot.isa.recorded import Launched
from epfuse.aot.isa.work import GemmWork, work_of
from epfuse.api import fused_experts
from epfuse.config import Bias, Combine, LayerShape, SwiGLUOAI
from epfuse.expert_map import ExpertMap
from epfuse.families.registry import FP8_PATHS
from epfuse.reference import run_reference
from epfuse.stages.combine.launch import launch_combine
from epfuse.stages.route.launch import launch_route
from epfuse.stages.route.reference import local_experts
from epfuse.stages.route.table import RouteTable
from epfuse.verify.problem import Problem
from epfuse.verify.scenarios import make_scenarios
from epfuse.verify.subject import Subject
from epfuse.verify.suite import run as verify
from epfuse.weights.experts import ExpertWeights


@dataclass
class Found:
    """What a case's execution found.

    Attributes:
        failures: in words; none is a case that passed.
        hashes: of the machine codes that ran -> their kernel.
        launches: how many.
        instructions: executed wave instructions.
        work: of the GEMMs, where their numbers are the case's subject.
        seconds: that it took, compiling included.
    """

    failures: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    launches: int = 0
    instructions: int = 0
    work: list[GemmWork] = field(default_factory=list)
    seconds: float = 0.0

    def judge(self, launches: list[Launched]) -> None:
        """Take in what ran."""
        for launched in launches:
            self.hashes[launched.recorded.hash] = launched.recorded.program.name
            self.launches += 1
            self.instructions += sum(launched.counts.instructions.values())

    def compare(self, launches: list[Launched]) -> None:
        """Take in what ran, and hold each launch against its stage's reference on what it was given."""
        self.judge(launches)
        for launched in launches:
            self.failures += map(str, mismatches(launched))

    def equal(self, what: str, got: torch.Tensor, than: str, wanted: torch.Tensor) -> None:
        """Hold a result against another one, bit for bit."""
        if wrong := int((~same(got, wanted)).sum()):
            self.failures.append(f"{what} differs from {than} in {wrong} of {got.numel()} elements")


@dataclass(frozen=True)
class CaseRecord:
    """One case.

    Attributes:
        name: what it executed.
        found: what came out.
    """

    name: str
    found: Found

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong."""
        return not self.found.failures

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "name": self.name,
            "ok": self.ok,
            "failures": self.found.failures,
            "launches": self.found.launches,
            "instructions": self.found.instructions,
            "seconds": round(self.found.seconds, 2),
            "gemms": [asdict(work) for work in self.found.work],
        }


class Case(Protocol):
    """One thing to execute and to judge."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        ...

    def execute(self, found: Found, seed: int) -> None:
        """Run under the ISA model, the waves' order by ``seed``; what is wrong goes to ``found``."""
        ...


def run_case(case: Case, seed: int, kept: Kept) -> Found:
    """Execute a case, or take what is kept of it; an error of the model is its failure."""
    if (before := kept.load(case.name, Found)) is not None:
        return before
    found, began = Found(), time.perf_counter()
    torch.set_num_threads(1)
    try:
        case.execute(found, seed)
    except IsaError as error:
        found.failures.append(f"{type(error).__name__}: {error}")
    found.seconds = time.perf_counter() - began
    return kept.save(case.name, Found, found)


@dataclass(frozen=True)
class LayerCase:
    """A layer call on exactly summable numbers: every launch, and the result, without one mismatch.

    Attributes:
        exact: the call.
    """

    exact: Exact

    @property
    def name(self) -> str:
        """Its sizes."""
        return f"layer {self.exact.name}"

    def execute(self, found: Found, seed: int) -> None:
        """Compare each launch with its stage's reference on what it was given, the result with the layer's."""
        exact = self.exact
        operands = exact.hidden(), exact.weights(0), exact.topk_weights(), exact.topk_ids(), exact.expert_map(0)
        with executing(TARGET, seed) as session:
            y = fused_experts(*operands, activation=exact.activation, path=exact.path, combine=exact.combine)
        found.compare(session.launches)
        found.work = [work for launched in session.launches if (work := work_of(launched)) is not None]
        if lost := session.defined.undefined(y):
            found.failures.append(f"the result has {lost} elements that nothing wrote")
        if exact.path not in FP8_PATHS:  # whose activations are quantised, unlike the reference's
            found.equal("the result", y, "the reference's", run_reference(*operands, activation=exact.activation))


@dataclass(frozen=True)
class Edges:
    """A GEMM's code at the edges of its operands (`epfuse.aot.isa.edges`), without one mismatch.

    Attributes:
        gemm: the code.
    """

    gemm: Gemm

    @property
    def name(self) -> str:
        """Its kernel and way."""
        return f"edges {self.gemm.name}"

    def execute(self, found: Found, seed: int) -> None:
        """Compare each launch with the stage's reference on what it was given."""
        for recorded in self.gemm.launches():
            launched, wanted = recorded.run(seed=seed), expected(recorded)
            found.judge([launched])
            found.failures += [str(each) for each in compare(launched, wanted)]
            if pairs := unseen(wanted["out"]):
                found.failures.append(f"{self.gemm.name}: {pairs} pairs of columns are NaN in every row")


@dataclass(frozen=True)
class RoutingCase:
    """The routing kernels alone: every size of their tiles.

    Attributes:
        tokens: T.
        block_m: rows of a block.
        shape: E, L, K.
        seed: of the routing.
    """

    tokens: int
    block_m: int
    shape: LayerShape
    seed: int

    @property
    def name(self) -> str:
        """Its sizes."""
        return f"route T={self.tokens} BLOCK_M={self.block_m}"

    def execute(self, found: Found, seed: int) -> None:
        """Compare the table with the reference's."""
        rng = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(-3, self.shape.experts + 3, (self.tokens, self.shape.top_k), generator=rng).int()
        expert_map = ExpertMap.contiguous(self.shape.experts, self.shape.experts // self.shape.local_experts, 1)
        with executing(TARGET, seed) as session:
            table = RouteTable.empty(ids.numel(), self.shape.local_experts, self.block_m, ids.device)
            launch_route(ids, expert_map.on(ids.device), self.shape.local_experts, table)
        found.compare(session.launches)


@dataclass(frozen=True)
class Combining:
    """The combine kernel alone, whose tiles are of other sizes than a layer's that is quick to execute.

    Attributes:
        exact: T, H, dtype and routing of the layer that it ends.
    """

    exact: Exact

    @property
    def name(self) -> str:
        """Its sizes."""
        exact = self.exact
        return f"combine {str(exact.dtype).removeprefix('torch.')} T={exact.tokens} H={exact.shape.hidden}"

    def execute(self, found: Found, seed: int) -> None:
        """Compare the sums with the reference's; the rows of remote routes are NaN."""
        exact, expert_map = self.exact, self.exact.expert_map(0)
        ids = exact.topk_ids()
        rng = torch.Generator().manual_seed(exact.seed)
        routed = torch.randint(-4, 5, (ids.numel(), exact.shape.hidden), generator=rng).to(exact.dtype)
        routed[local_experts(ids, expert_map.on(ids.device)) < 0] = torch.nan
        with executing(TARGET, seed) as session:
            out = torch.empty(exact.tokens, exact.shape.hidden, dtype=exact.dtype)
            launch_combine(routed, ids, expert_map.on(ids.device), exact.shape.local_experts, out)
        found.compare(session.launches)


@dataclass(frozen=True)
class Shards:
    """Exact sums in float32: the ranks' results add up to the unsharded layer's, bit for bit.

    Attributes:
        exact: the call; float32, and as many routes as are drawn for any rank.
    """

    exact: Exact

    @property
    def name(self) -> str:
        """Its sizes."""
        return f"{self.exact.ranks} shards {self.exact.name}"

    def execute(self, found: Found, seed: int) -> None:
        """Every rank, and a rank that holds all experts."""
        exact = self.exact
        rng = torch.Generator().manual_seed(exact.seed)
        ids = torch.randint(0, exact.shape.experts, (exact.tokens, exact.shape.top_k), generator=rng).int()
        hidden, factors = exact.hidden(), exact.topk_weights()
        shards = [exact.weights(rank) for rank in range(exact.ranks)]
        parts = [shard.dense_experts for shard in shards]
        whole = ExpertWeights.dense(
            torch.cat([part.w13 for part in parts if part]), torch.cat([part.w2 for part in parts if part])
        )
        everyone = ExpertMap.all_local(exact.shape.experts)
        with executing(TARGET, seed) as session:
            total = torch.zeros_like(hidden)
            for rank, shard in enumerate(shards):
                total += fused_experts(
                    hidden, shard, factors, ids, exact.expert_map(rank), activation=EXACT, path=exact.path
                )
            unsharded = fused_experts(hidden, whole, factors, ids, everyone, activation=EXACT, path=exact.path)
        found.judge(session.launches)
        reference = run_reference(hidden, whole, factors, ids, everyone, EXACT)
        found.equal("the shards' sum", total, "the unsharded layer's result", unsharded)
        found.equal("the shards' sum", total, "the reference's", reference)


@dataclass(frozen=True)
class BudgetCase:
    """General numbers: `epfuse verify`'s scenarios, rank by rank and summed, within its budgets.

    Attributes:
        problem: sizes, tokens, seed.
        subject: one way to compute the layer.
        scenarios: names of scenarios.
    """

    problem: Problem
    subject: Subject
    scenarios: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its path and scenarios."""
        subject, problem = self.subject, self.problem
        atomic = " atomic" if subject.combine is Combine.ATOMIC else ""
        kind = "" if type(problem.activation) is SwiGLUOAI else f" {problem.activation.kind}"
        biases = "" if problem.bias is Bias.NONE else " biases"
        way = f"{subject.path.value} {subject.form.value}{atomic}{kind}{biases}"
        return f"budget {way} T={','.join(map(str, problem.tokens))}: {', '.join(self.scenarios)}"

    def execute(self, found: Found, seed: int) -> None:
        """`epfuse.verify.suite.run`, unchanged."""
        with executing(TARGET, seed) as session:
            scenarios = [each for each in make_scenarios(self.problem) if each.name in self.scenarios]
            record = verify(self.problem, (self.subject,), scenarios=scenarios)
        found.judge(session.launches)
        for case in record.cases:
            found.failures += [f"{case.path}, {case.name}: {failure}" for failure in case.failures]
