"""Layers with exactly summable numbers, small integers times powers of two: every order of summation is exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from epfuse.arguments import checks_enums
from epfuse.config import (
    Activation,
    Bias,
    Combine,
    GELUTanh,
    LayerShape,
    Path,
    ReLU2,
    SoftcappedSwiGLU,
    SwiGLUOAI,
    WeightFormat,
)
from epfuse.expert_map import ExpertMap
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.target import Target
from epfuse.weights.experts import ExpertWeights

EXACT = SwiGLUOAI(alpha=0.0, beta=1.0, limit=7.0)
"""With this gain the sigmoid is one half: the activation of a small integer is exact whatever exp and division do."""

GAINS: dict[Activation, tuple[int, ...]] = {
    EXACT: (1, 1),
    GELUTanh(): (128, 1),
    SoftcappedSwiGLU(gate_cap=4.0, up_cap=2.0): (1024, 512),
    ReLU2(): (1,),
}
"""Activation -> what the rows of gate and of up are multiplied by: a product is 0, or so large that tanh is exactly -1
or 1, and the sigmoid 0 or 1."""

NAN_TOKEN, NAN_WEIGHT = 4, 6
"""Tokens whose results are NaN, and no other's."""


@checks_enums
@dataclass(frozen=True)
class Exact:
    """One layer call on exactly summable numbers.

    Attributes:
        path, form, dtype, combine: as in a call.
        shape: sizes of one rank's layer.
        tokens: T.
        live: local routes, of the T*K.
        seed: of the numbers and the routing.
        activation: of `GAINS`.
        bias: of both projections, or none.
    """

    path: Path
    form: WeightFormat
    dtype: torch.dtype
    combine: Combine
    shape: LayerShape
    tokens: int
    live: int
    seed: int
    activation: Activation = EXACT
    bias: Bias = Bias.NONE

    @property
    def name(self) -> str:
        """What a failed case is called by."""
        dtype = str(self.dtype).removeprefix("torch.") if self.form is WeightFormat.DENSE else self.form.value
        atomic = " atomic" if self.combine is Combine.ATOMIC else ""
        kind = "" if self.activation == EXACT else f" {self.activation.kind}"
        biases = "" if self.bias is Bias.NONE else " biases"
        sizes = f"T={self.tokens} H={self.shape.hidden} I={self.shape.intermediate}"
        return f"{self.path.value} {dtype}{atomic}{kind}{biases} {sizes}"

    @property
    def ranks(self) -> int:
        """P."""
        return self.shape.experts // self.shape.local_experts

    def _draw(self, *key: int) -> torch.Generator:
        seed = self.seed
        for part in key:
            seed = (seed * 1_000_003 + part) % 2**62
        return torch.Generator().manual_seed(seed)

    def hidden(self) -> torch.Tensor:
        """``[T, H]``: -1, 0 or 1 times a power of two for each 32 and each 128 columns; token `NAN_TOKEN` has a NaN.

        So no group of columns that has a scale of its own has its neighbours'.
        """
        rng, columns = self._draw(0), self.shape.hidden
        values = torch.randint(-1, 2, (self.tokens, columns), generator=rng)
        powers = torch.zeros(self.tokens, columns)
        for group in (32, 128):
            drawn = torch.randint(-1, 1, (self.tokens, -(-columns // group)), generator=rng)
            powers += drawn.repeat_interleave(group, 1)[:, :columns]
        hidden = (values * torch.exp2(powers)).to(self.dtype)
        hidden[NAN_TOKEN : NAN_TOKEN + 1, self.shape.hidden // 3] = torch.nan
        return hidden

    def topk_weights(self) -> torch.Tensor:
        """``[T, K]``: powers of two; those of token `NAN_WEIGHT` are NaN."""
        powers = torch.randint(-2, 2, (self.tokens, self.shape.top_k), generator=self._draw(1))
        factors = torch.exp2(powers.float())
        factors[NAN_WEIGHT : NAN_WEIGHT + 1] = torch.nan
        return factors

    def topk_ids(self) -> torch.Tensor:
        """``[T, K]`` int32: ``live`` routes of rank 0, three quarters of them to one expert, one to the last."""
        rng, shape = self._draw(2), self.shape
        routes = self.tokens * shape.top_k
        if shape.experts > shape.local_experts:
            ids = torch.randint(shape.local_experts, shape.experts, (routes,), generator=rng)
        else:
            ids = torch.full((routes,), -1)
        ids[torch.rand(routes, generator=rng) < 0.1] = -1
        where = torch.randperm(routes, generator=rng)[: self.live]
        local = torch.zeros(where.numel(), dtype=torch.int64)
        local[where.numel() * 3 // 4 :] = min(2, shape.local_experts - 1)
        local[-1:] = shape.local_experts - 1
        ids[where] = local
        return ids.view(self.tokens, shape.top_k).int()

    def dense(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """w13 and w2 of a rank in float32: -1, 0 or 1 times a power of two for each row and 32 columns, and each block.

        A block has 128 rows and 128 columns.
        """
        shape, drawn = self.shape, []
        gains = GAINS[self.activation]
        sizes = ((len(gains) * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))
        for which, (rows, columns) in enumerate(sizes):
            stack = torch.empty(shape.local_experts, rows, columns)
            for slot in range(shape.local_experts):
                rng = self._draw(3, which, rank * shape.local_experts + slot)
                values = torch.randint(-1, 2, (rows, columns), generator=rng)
                powers = torch.randint(-1, 1, (rows, -(-columns // 32)), generator=rng).repeat_interleave(32, 1)
                blocks = torch.randint(0, 2, (-(-rows // 128), -(-columns // 128)), generator=rng)
                blocks = blocks.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)
                stack[slot] = values * torch.exp2((powers[:, :columns] + blocks[:, :columns]).float())
            drawn.append(stack)
        drawn[0] *= torch.tensor(gains).repeat_interleave(shape.intermediate)[:, None]
        return drawn[0], drawn[1]

    def weights(self, rank: int) -> ExpertWeights:
        """A rank's experts in the case's format."""
        stacks = self.dense(rank)
        if self.form is WeightFormat.DENSE:
            made = ExpertWeights.dense(*(stack.to(self.dtype) for stack in stacks))
        else:
            parts = [part for stack in map(MXFP8.quantize, stacks) for part in (stack.values, stack.scales)]
            blocks = self.form in (WeightFormat.BLOCK_FP8, WeightFormat.BLOCK_FP8_FNUZ)
            made = ExpertWeights.block_fp8(*parts) if blocks else ExpertWeights.mxfp8(*parts)
        if self.bias is Bias.ADDED:
            made = ExpertWeights(made.formats, *(self._biases(rank, stack) for stack in stacks))
        return made if self.form in made.kept else made.prepare(Target.GFX942)

    def _biases(self, rank: int, stack: torch.Tensor) -> torch.Tensor:
        """``[L, N]`` float32 beside ``[L, N, K]``: quarters, from -1 to 1."""
        return torch.randint(-4, 5, stack.shape[:2], generator=self._draw(4, rank, stack.shape[1])) / 4

    def expert_map(self, rank: int) -> ExpertMap:
        """Rank's contiguous share."""
        return ExpertMap.contiguous(self.shape.experts, self.ranks, rank)
