"""Drop tiles by what the compiler says of them, before any is timed; and have them compiled, many at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from epfuse.aot.tasks import start
from epfuse.arguments import checks_enums
from epfuse.config import Bias, LayerShape, Path, WeightFormat
from epfuse.families.family import Stage
from epfuse.families.registry import family_of
from epfuse.stages.tiles import GemmTile, LayerTiles
from epfuse.target import Target
from epfuse.tuning.run import TuningRequest
from epfuse.tuning.search import TuningPlan
from epfuse.workers import Died, Workers

RESOURCE_GATES = ("no spills", "no scratch", "LDS fits", "no spills in the main loop", "shared memory fits")
"""The gates of `epfuse.aot.gates` that no time can make up for. The others are rules for kernels that ship."""


@checks_enums
@dataclass(frozen=True)
class TileCandidate:
    """A tile to compile.

    Attributes:
        target: a GPU, which need not be there.
        path: what runs.
        weights: the format that it reads.
        shape: the layer's sizes.
        tokens: T.
        stage: which GEMM.
        block_m: rows of a block.
        tile: the tile.
        bias: of both projections or none.
    """

    target: Target
    path: Path
    weights: WeightFormat
    shape: LayerShape
    tokens: int
    stage: Stage
    block_m: int
    tile: GemmTile
    bias: Bias = Bias.NONE

    @property
    def code(self) -> tuple[object, ...]:
        """What its code depends on: not on T, on K, and on H and I as far as steps of the reduction divide them."""
        sizes = (self.shape.hidden, self.shape.intermediate)
        steps = tuple(math.gcd(size, self.tile.block_k) for size in sizes)
        layer = (self.target, self.path, self.weights, steps, self.shape.top_k, self.bias)
        return (*layer, self.kernel, self.block_m, self.tile)

    @property
    def kernel(self) -> str:
        """The package of ``epfuse.stages`` whose kernel runs the stage: that of both where they are one launch."""
        tiles = LayerTiles(self.block_m, self.tile, self.tile)
        return family_of(self.path, self.weights, tiles).step_of(self.stage, tiles)


def candidates_of(request: TuningRequest, plan: TuningPlan) -> list[TileCandidate]:
    """What a plan tries."""
    point = plan.point
    call = request.device.target, point.path, point.weights, request.shape, point.tokens
    return [
        TileCandidate(*call, stage, block_m, tile, request.bias)
        for block_m, stages in plan.tries.items()
        for stage, tiles in stages.items()
        for tile in tiles
    ]


def distinct(candidates: Iterable[TileCandidate]) -> list[TileCandidate]:
    """One candidate for each code."""
    return list({candidate.code: candidate for candidate in candidates}.values())


def unfit(
    candidates: Sequence[TileCandidate], workers: int, progress: Callable[[int, int], None]
) -> dict[TileCandidate, str]:
    """Compile every candidate; those that don't do, and why: one whose compiler dies or doesn't end is among them.

    Processes of their own compile, so this one's driver stays as it is; Triton's cache keeps what they made.

    Args:
        candidates: what to compile.
        workers: processes.
        progress: called with the candidates done and all of them.
    """
    with Workers(workers, start) as pool:
        reasons = pool.map(
            shortfall, [(candidate,) for candidate in candidates], lambda done: progress(done, len(candidates))
        )
    return {
        candidate: reason.reason if isinstance(reason, Died) else reason
        for candidate, reason in zip(candidates, reasons, strict=True)
        if reason is not None
    }


def shortfall(candidate: TileCandidate) -> str | None:
    """Why the compiled tile won't do; None if it may."""
    import torch

    from epfuse.aot.gates import check
    from epfuse.aot.kernels import KernelUse, build
    from epfuse.aot.launches import launches_of
    from epfuse.expert_map import ExpertMap
    from epfuse.tuning.calls import bind_layer, layer_call
    from epfuse.weights.experts import ExpertWeights

    shape, tokens = candidate.shape, candidate.tokens
    tiles = LayerTiles(candidate.block_m, candidate.tile, candidate.tile)

    def call() -> None:
        operands = layer_call(
            candidate.weights,
            ExpertWeights.without_data(candidate.weights, shape, bias=candidate.bias),
            torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device="meta"),
            torch.empty(tokens, shape.top_k, dtype=torch.float32, device="meta"),
            torch.empty(tokens, shape.top_k, dtype=torch.int32, device="meta"),
            ExpertMap.contiguous(shape.experts, shape.experts // shape.local_experts, 0),
        )
        bind_layer(candidate.path, candidate.weights, tiles, operands)()

    use = KernelUse((candidate.path.value,), ("bf16",), ("tuned",), (tokens, tokens))
    try:
        launches = [launch for launch in launches_of(candidate.target, call) if launch.stage == candidate.kernel]
        assert launches, f"no launch of {candidate.kernel}"
        kernels = [build(launch, use) for launch in launches]
    except Exception as error:  # whatever the compiler raises
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    failures = [gate.detail for gate in check(candidate.target, kernels) if gate.name in RESOURCE_GATES and not gate.ok]
    return "; ".join(failures) or None
