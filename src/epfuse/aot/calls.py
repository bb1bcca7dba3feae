"""The calls whose kernels are compiled: paths, weight formats, dtypes, sizes, and tokens that reach every tile."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from epfuse.api import fused_experts
from epfuse.arguments import checks_enums
from epfuse.config import (
    GPT_OSS_120B,
    MINIMAX_M3_EP8,
    Activation,
    Bias,
    Combine,
    GELUTanh,
    Path,
    ReLU2,
    SoftcappedSwiGLU,
    SwiGLUOAI,
    WeightFormat,
    silu_gate,
)
from epfuse.expert_map import ExpertMap
from epfuse.policy import READABLE, CallKind, decide, readable_formats
from epfuse.target import Target
from epfuse.weights.experts import ExpertWeights

MOST_TOKENS = 16384
"""Token counts go up to here; every tile that the tables have is reached long before."""

SHAPES = {
    "minimax-m3": MINIMAX_M3_EP8,
    # gpt-oss-120b on 8 ranks: 2880 is no multiple of any K step, so the loops mask their tails
    "gpt-oss-120b": GPT_OSS_120B.rank_of(ep_size=8),
}
"""Sizes that kernels are specialised for."""

KINDS: dict[str, tuple[Activation, Bias]] = {
    "swiglu-oai": (SwiGLUOAI(), Bias.NONE),
    "biases": (SwiGLUOAI(), Bias.ADDED),
    "gelu-tanh": (GELUTanh(), Bias.NONE),
    "softcapped-swiglu": (SoftcappedSwiGLU(4.0, 25.0), Bias.NONE),
    "relu2": (ReLU2(), Bias.NONE),
    "silu": (silu_gate(), Bias.NONE),
}
"""What stands between and beside the projections. The first is compiled for every tile, the others for one a family."""
UNBOUNDED = "silu"
"""Has the first one's kernels, but with one scale a row, where many rows have a launch for each GEMM."""
KIND_SHAPE, KIND_TOKENS = "gpt-oss-120b", (4096, 64)
"""Of calls of the other kinds: many rows, for a family that takes no fewer, and few."""
_EVERY_KIND = (Path.BF16, Path.W8A8)
"""Paths whose kernels differ by activation; of the other paths biases alone are compiled."""

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
        kind: name in `KINDS`.
    """

    target: Target
    path: Path
    form: WeightFormat
    dtype: str
    shape: str
    combine: Combine
    tokens: int
    kind: str = "swiglu-oai"

    def run(self) -> None:
        """Call `fused_experts` on the meta device; only meaningful inside `capture.launches_of`."""
        shape, dtype = SHAPES[self.shape], DTYPES[self.dtype]
        activation, bias = KINDS[self.kind]
        ranks = shape.experts // shape.local_experts
        fused_experts(
            torch.empty(self.tokens, shape.hidden, dtype=dtype, device="meta"),
            ExpertWeights.without_data(self.form, shape, dtype, type(activation), bias),
            torch.empty(self.tokens, shape.top_k, dtype=torch.float32, device="meta"),
            torch.empty(self.tokens, shape.top_k, dtype=torch.int32, device="meta"),
            ExpertMap.contiguous(shape.experts, ranks, 0),
            activation=activation,
            path=self.path,
            combine=self.combine,
        )


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
            for dtype in dtypes if form is WeightFormat.DENSE else ["bf16"]:
                for shape in shapes:
                    kind = CallKind(path, target, SHAPES[shape], frozenset({form}), DTYPES[dtype])
                    ways = [way for way in Combine if form in readable_formats(replace(kind, combine=way))]
                    counts = token_counts(kind)
                    found += [Call(target, path, form, dtype, shape, way, tokens) for way in ways for tokens in counts]
                    if form is WeightFormat.ROW_FP8:
                        found += [Call(target, path, form, dtype, shape, way, MOST_TOKENS, UNBOUNDED) for way in ways]
    if KIND_SHAPE in shapes and "bf16" in dtypes:
        found += [call for path in paths for call in other_kinds(target, path)]
    return found


@checks_enums
def other_kinds(target: Target, path: Path) -> list[Call]:
    """A call of each kind but the first on each of its families, on the weights that its kernels read best."""
    found = []
    for name, (activation, bias) in list(KINDS.items())[1:]:
        if name == UNBOUNDED:
            continue
        kind = CallKind(path, target, SHAPES[KIND_SHAPE], activation=type(activation), bias=bias)
        forms = readable_formats(kind)
        if forms and (bias is Bias.ADDED or path in _EVERY_KIND):
            counts = {decide(kind.on(path, forms[0]), tokens).family: tokens for tokens in KIND_TOKENS}
            call = (target, path, forms[0], "bf16", KIND_SHAPE, Combine.DETERMINISTIC)
            found += [Call(*call, tokens, name) for tokens in counts.values()]
    return found


def token_counts(kind: CallKind) -> list[int]:
    """The powers of two (the routing kernels' sizes follow them) and the first and last T of every choice of tiles."""
    chosen = {1 << power for power in range(MOST_TOKENS.bit_length())}
    before = None
    for tokens in range(1, MOST_TOKENS + 1):
        decision = decide(kind, tokens)
        if before is not None and decision != before:
            chosen |= {tokens - 1, tokens}
        before = decision
    return sorted(chosen)
