"""The calls whose kernels are compiled: paths, weight formats, dtypes, sizes, and tokens that reach every tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from epfuse.api import fused_experts
from epfuse.arguments import checks_enums
from epfuse.config import MINIMAX_M3_EP8, Combine, LayerShape, Path, WeightFormat
from epfuse.expert_map import ExpertMap
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.policy import READABLE, decide, readable_formats
from epfuse.target import Target
from epfuse.weights.block_fp8 import BLOCK, BlockFP8
from epfuse.weights.experts import ExpertWeights, Projections
from epfuse.weights.fragment import FragmentMXFP8
from epfuse.weights.panels import PANEL_ROWS, STEP_K, RowOrder
from epfuse.weights.row_fp8 import RowFP8

MOST_TOKENS = 16384
"""Token counts go up to here; every tile that the tables have is reached long before."""

SHAPES = {
    "minimax-m3": MINIMAX_M3_EP8,
    # gpt-oss-120b on 8 ranks: 2880 is no multiple of any K step, so the loops mask their tails
    "gpt-oss-120b": LayerShape(hidden=2880, intermediate=2880, experts=128, local_experts=16, top_k=4),
}
"""Sizes that kernels are specialised for."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@checks_enums
@dataclass(frozen=True)
class Call:
    """One call of the layer, without data.

    Attributes:
        target: where it would run.
        path: which path is asked for.
        form: the format of the weights.
        dtype: name of the activations' dtype.
        shape: name of the sizes.
        combine: how routes are summed.
        tokens: T.
    """

    target: Target
    path: Path
    form: WeightFormat
    dtype: str
    shape: str
    combine: Combine
    tokens: int

    def run(self) -> None:
        """Call `fused_experts` on the meta device; only meaningful inside `capture.launches_of`."""
        shape, dtype = SHAPES[self.shape], DTYPES[self.dtype]
        ranks = shape.experts // shape.local_experts
        fused_experts(
            torch.empty(self.tokens, shape.hidden, dtype=dtype, device="meta"),
            WEIGHTS[self.form](shape, dtype),
            torch.empty(self.tokens, shape.top_k, dtype=torch.float32, device="meta"),
            torch.empty(self.tokens, shape.top_k, dtype=torch.int32, device="meta"),
            ExpertMap.contiguous(shape.experts, ranks, 0),
            path=self.path,
            combine=self.combine,
        )


def dense(shape: LayerShape, dtype: torch.dtype) -> ExpertWeights:
    """Weights in ``dtype``."""
    w13, w2 = (_empty(size, dtype) for size in _sizes(shape))
    return ExpertWeights.dense(w13, w2)


def mxfp8(shape: LayerShape, dtype: torch.dtype, values: torch.dtype = torch.float8_e4m3fn) -> ExpertWeights:
    """MXFP8 weights row-major; E4M3FNUZ values are what `ExpertWeights.prepare` makes of them for gfx942."""
    w13, w2 = (MXFP8(_empty(size, values), _empty((*size[:-1], size[-1] // 32), torch.uint8)) for size in _sizes(shape))
    return _experts(shape, mxfp8_experts=Projections(w13, w2))


def block_fp8(shape: LayerShape, dtype: torch.dtype, values: torch.dtype = torch.float8_e4m3fn) -> ExpertWeights:
    """Block FP8 weights; as `mxfp8`."""
    w13, w2 = (
        BlockFP8(_empty(size, values), _empty((size[0], -(-size[1] // BLOCK), -(-size[2] // BLOCK)), torch.float32))
        for size in _sizes(shape)
    )
    return _experts(shape, block_fp8_experts=Projections(w13, w2))


def fragment(shape: LayerShape, dtype: torch.dtype) -> ExpertWeights:
    """What `ExpertWeights.prepare` makes of MXFP8 weights for Hopper."""
    stacks = []
    for (local, rows, columns), order in zip(_sizes(shape), (RowOrder.GATE_UP, RowOrder.PLAIN), strict=True):
        panels, steps = -(-rows // PANEL_ROWS), -(-columns // STEP_K)
        codes = _empty((local, panels, steps * STEP_K // 32, 32 * PANEL_ROWS), torch.uint8)
        scales = _empty((local, panels, steps, PANEL_ROWS), torch.int32)
        stacks.append(FragmentMXFP8(codes, scales, rows, columns, order))
    return _experts(shape, fragment_experts=Projections(stacks[0], stacks[1]))


def row_fp8(shape: LayerShape, dtype: torch.dtype) -> ExpertWeights:
    """What `ExpertWeights.prepare` makes of MXFP8 weights for Hopper's W8A8."""
    stacks = []
    for (local, rows, columns), order in zip(_sizes(shape), (RowOrder.GATE_UP, RowOrder.PLAIN), strict=True):
        panels, steps = -(-rows // PANEL_ROWS), -(-columns // STEP_K)
        codes = _empty((local, panels, steps, PANEL_ROWS, STEP_K), torch.float8_e4m3fn)
        scales = _empty((local, panels * PANEL_ROWS), torch.float32)
        stacks.append(RowFP8(codes, scales, rows, columns, order))
    return _experts(shape, row_fp8_experts=Projections(stacks[0], stacks[1]))


WEIGHTS: dict[WeightFormat, Callable[[LayerShape, torch.dtype], ExpertWeights]] = {
    WeightFormat.DENSE: dense,
    WeightFormat.MXFP8: mxfp8,
    WeightFormat.MXFP8_FNUZ: partial(mxfp8, values=torch.float8_e4m3fnuz),
    WeightFormat.FRAGMENT: fragment,
    WeightFormat.ROW_FP8: row_fp8,
    WeightFormat.BLOCK_FP8: block_fp8,
    WeightFormat.BLOCK_FP8_FNUZ: partial(block_fp8, values=torch.float8_e4m3fnuz),
}
"""How weights of each format are made without data."""


@checks_enums
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
        for form in READABLE[target].get(path, ()):
            ways = [way for way in Combine if form in readable_formats(target, path, way)]
            for dtype in dtypes if form is WeightFormat.DENSE else ["bf16"]:
                for shape in shapes:
                    counts = token_counts(target, path, form, SHAPES[shape], DTYPES[dtype])
                    found += [Call(target, path, form, dtype, shape, way, tokens) for way in ways for tokens in counts]
    return found


def token_counts(target: Target, path: Path, form: WeightFormat, shape: LayerShape, dtype: torch.dtype) -> list[int]:
    """The powers of two (the routing kernels' sizes follow them) and the first and last T of every choice of tiles."""
    chosen = {1 << power for power in range(MOST_TOKENS.bit_length())}
    before = None
    for tokens in range(1, MOST_TOKENS + 1):
        decision = decide(path, target, shape, tokens, frozenset({form}), dtype)
        if before is not None and decision != before:
            chosen |= {tokens - 1, tokens}
        before = decision
    return sorted(chosen)


def _empty(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _experts(shape: LayerShape, **formats: Any) -> ExpertWeights:
    return ExpertWeights(shape.local_experts, shape.hidden, shape.intermediate, **formats)


def _sizes(shape: LayerShape) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    local, hidden, intermediate = shape.local_experts, shape.hidden, shape.intermediate
    return (local, 2 * intermediate, hidden), (local, hidden, intermediate)
