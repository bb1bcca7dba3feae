"""The calls whose kernels are compiled: paths, weight formats, dtypes and sizes, and token counts that reach every tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from epfuse.api import fused_experts
from epfuse.config import MINIMAX_M3_EP8, LayerShape, Path, WeightFormat
from epfuse.errors import UnsupportedTarget
from epfuse.expert_map import ExpertMap
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.policy import GPU_FORMATS, decide
from epfuse.target import Target
from epfuse.weights.experts import ExpertWeights, Projections
from epfuse.weights.fragment import PANEL_ROWS, STEP_K, FragmentMXFP8, RowOrder

MOST_TOKENS = 16384
"""Token counts go up to here; every tile that the tables have is reached long before."""

SHAPES = {
    "minimax-m3": MINIMAX_M3_EP8,
    # gpt-oss-120b on 8 ranks: 2880 is no multiple of any K step, so the loops mask their tails
    "gpt-oss-120b": LayerShape(hidden=2880, intermediate=2880, experts=128, local_experts=16, top_k=4),
}
"""Sizes that kernels are specialised for."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Call:
    """One call of the layer, without data.

    Attributes:
        target: where it would run.
        path: which path is asked for.
        form: the format of the weights.
        dtype: name of the activations' dtype.
        shape: name of the sizes.
        tokens: T.
    """

    target: Target
    path: Path
    form: WeightFormat
    dtype: str
    shape: str
    tokens: int

    def run(self) -> None:
        """Call `fused_experts` on the meta device; only meaningful inside `capture.launches_of`."""
        shape, dtype = SHAPES[self.shape], DTYPES[self.dtype]
        ranks = shape.experts // shape.local_experts
        fused_experts(
            torch.empty(self.tokens, shape.hidden, dtype=dtype, device="meta"),
            WEIGHTS[self.form](shape, dtype, self.target),
            torch.empty(self.tokens, shape.top_k, dtype=torch.float32, device="meta"),
            torch.empty(self.tokens, shape.top_k, dtype=torch.int32, device="meta"),
            ExpertMap.contiguous(shape.experts, ranks, 0),
            path=self.path,
        )


def dense(shape: LayerShape, dtype: torch.dtype, target: Target) -> ExpertWeights:
    """Weights in ``dtype``."""
    return ExpertWeights.dense(*(torch.empty(s, dtype=dtype, device="meta") for s in _sizes(shape)))


def mxfp8(shape: LayerShape, dtype: torch.dtype, target: Target) -> ExpertWeights:
    """MXFP8 weights as checkpoints have them."""
    parts = []
    for size in _sizes(shape):
        parts.append(torch.empty(size, dtype=torch.float8_e4m3fn, device="meta"))
        parts.append(torch.empty(*size[:-1], size[-1] // 32, dtype=torch.uint8, device="meta"))
    return ExpertWeights.mxfp8(*parts)


def fragment(shape: LayerShape, dtype: torch.dtype, target: Target) -> ExpertWeights:
    """What `ExpertWeights.prepare` makes of MXFP8 weights for Hopper."""
    stacks = []
    for (local, rows, columns), order in zip(_sizes(shape), (RowOrder.GATE_UP, RowOrder.PLAIN), strict=True):
        panels, steps = -(-rows // PANEL_ROWS), -(-columns // STEP_K)
        codes = torch.empty(local, panels, steps * STEP_K // 32, 32 * PANEL_ROWS, dtype=torch.uint8, device="meta")
        scales = torch.empty(local, panels, steps, PANEL_ROWS, dtype=torch.int32, device="meta")
        stacks.append(FragmentMXFP8(codes, scales, rows, columns, order))
    return ExpertWeights(
        shape.local_experts, shape.hidden, shape.intermediate, fragment_experts=Projections(stacks[0], stacks[1])
    )


WEIGHTS: dict[WeightFormat, Callable[[LayerShape, torch.dtype, Target], ExpertWeights]] = {
    WeightFormat.DENSE: dense,
    WeightFormat.MXFP8: mxfp8,
    WeightFormat.FRAGMENT: fragment,
}
"""How weights of each format are made without data."""


def calls(target: Target, paths: list[Path], shapes: list[str], dtypes: list[str]) -> list[Call]:
    """Every call that reaches a kernel or a tile of its own.

    Args:
        target: a GPU.
        paths: paths to compile; one that the target can't run has no calls.
        shapes: names in `SHAPES`.
        dtypes: names in `DTYPES`; formats other than DENSE take bf16 alone.
    """
    found = []
    for path in paths:
        for form in GPU_FORMATS.get(path, ()):
            if form is WeightFormat.FRAGMENT and target is not Target.SM90:
                continue
            for dtype in dtypes if form is WeightFormat.DENSE else ["bf16"]:
                for shape in shapes:
                    found += [
                        Call(target, path, form, dtype, shape, tokens)
                        for tokens in token_counts(target, path, form, SHAPES[shape], DTYPES[dtype])
                    ]
    return found


def token_counts(target: Target, path: Path, form: WeightFormat, shape: LayerShape, dtype: torch.dtype) -> Iterator[int]:
    """The powers of two (the routing kernels' sizes follow them) and the first T of every choice of tiles."""
    before = None
    for tokens in range(1, MOST_TOKENS + 1):
        try:
            decision = decide(path, target, shape, tokens, frozenset({form}), dtype)
        except UnsupportedTarget:
            return
        if decision != before or tokens & (tokens - 1) == 0:
            yield tokens
        before = decision


def _sizes(shape: LayerShape) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    local, hidden, intermediate = shape.local_experts, shape.hidden, shape.intermediate
    return (local, 2 * intermediate, hidden), (local, hidden, intermediate)
