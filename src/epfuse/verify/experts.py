"""Random weights of one rank, made expert by expert, so that no other rank's weights ever exist."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from epfuse.arguments import checks_enums
from epfuse.config import Bias, Path, WeightFormat
from epfuse.errors import ConfigError
from epfuse.numerics.mxfp8 import BLOCK, MXFP8
from epfuse.policy import READABLE
from epfuse.target import Target
from epfuse.verify.problem import Problem
from epfuse.weights.dense import DenseExperts
from epfuse.weights.experts import ExpertWeights
from epfuse.weights.formats import FORMAT_OF
from epfuse.weights.mxfp8 import MXFP8Experts


def rank_weights(problem: Problem, ep_rank: int) -> ExpertWeights:
    """Experts ``[ep_rank * L, (ep_rank + 1) * L)``; a unit-variance input leaves each projection with unit variance.

    Seeded by the global expert id: an expert's weights do not depend on how many ranks there are.
    """
    return dense_weights(problem, _of_rank(problem, ep_rank))


def rank_mxfp8(problem: Problem, ep_rank: int) -> ExpertWeights:
    """`rank_weights` in MXFP8: `mxfp8_weights` of the rank's experts."""
    return mxfp8_weights(problem, _of_rank(problem, ep_rank))


def dense_weights(problem: Problem, experts: Sequence[int]) -> ExpertWeights:
    """Some experts, by their global ids, slot by slot, in the problem's dtype."""
    local = len(experts)
    w13, w2 = (torch.empty(local, *shape, dtype=problem.dtype, device=problem.device) for shape in _shapes(problem))
    biases = _biases(problem, local)
    for slot, drawn in enumerate(_draws(problem, experts)):
        for stack, numbers in zip((w13, w2, *biases), drawn, strict=True):
            stack[slot].copy_(numbers)
    return ExpertWeights((DenseExperts(w13, w2),), *biases)


def mxfp8_weights(problem: Problem, experts: Sequence[int]) -> ExpertWeights:
    """`dense_weights` in MXFP8, with the corners of the format in every matrix.

    In its first block of columns every 7th row has scale byte 0, so that its values are of no account; in the last
    block every 11th row is zeros.
    """
    local = len(experts)
    stacks, biases = [], _biases(problem, local)
    for rows, columns in _shapes(problem):
        values = torch.empty(local, rows, columns, dtype=torch.float8_e4m3fn, device=problem.device)
        scales = torch.empty(local, rows, columns // BLOCK, dtype=torch.uint8, device=problem.device)
        stacks.append(MXFP8(values, scales))
    for slot, drawn in enumerate(_draws(problem, experts)):
        for bias, numbers in zip(biases, drawn[2:], strict=True):
            bias[slot].copy_(numbers)
        for stack, matrix in zip(stacks, drawn[:2], strict=True):
            matrix[::11, -BLOCK:] = 0.0
            packed = MXFP8.quantize(matrix)
            packed.scales[::7, 0] = 0
            stack.values[slot].copy_(packed.values)
            stack.scales[slot].copy_(packed.scales)
    return ExpertWeights((MXFP8Experts(*stacks),), *biases)


@checks_enums
def in_format(weights: ExpertWeights, form: WeightFormat, target: Target) -> ExpertWeights:
    """Weights as `rank_weights` or `rank_mxfp8` gives them, or a copy of them, in the format that a path reads.

    Raises:
        ConfigError: on ``target`` nothing makes that format of them; another one must not be judged in its name.
    """
    if form in weights.kept:
        return weights
    packed = weights.mxfp8_experts
    assert packed is not None
    stacks = (packed.w13, packed.w2)
    loaded = FORMAT_OF[form].of_mxfp8(*stacks) or MXFP8Experts.of_mxfp8(*stacks)
    converted = ExpertWeights((loaded,), weights.gate_up_bias, weights.down_bias)
    path = next((path for path, forms in READABLE[target].items() if form in forms), Path.AUTO)
    made = converted if form in converted.kept else converted.prepare(target, path)
    if form not in made.kept:
        kept = " and ".join(sorted(found.value for found in made.kept))
        raise ConfigError(f"weights in mxfp8 can't be verified in {form.value}: on {target.value} they become {kept}")
    return made


def _of_rank(problem: Problem, ep_rank: int) -> range:
    return range(ep_rank * problem.local_experts, (ep_rank + 1) * problem.local_experts)


def _shapes(problem: Problem) -> tuple[tuple[int, int], tuple[int, int]]:
    hidden, intermediate = problem.hidden, problem.intermediate
    return (problem.activation.inputs * intermediate, hidden), (hidden, intermediate)


def _biases(problem: Problem, local: int) -> list[torch.Tensor]:
    """Memory for both, or nothing."""
    if problem.bias is Bias.NONE:
        return []
    return [torch.empty(local, shape[0], device=problem.device) for shape in _shapes(problem)]


def _draws(problem: Problem, experts: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """Float32 w13 and w2 of each expert, then its biases if it has them."""
    rng = torch.Generator(problem.device)
    for expert in experts:
        rng.manual_seed(problem.seed * 1_000_003 + expert)
        yield [
            torch.randn(shape, generator=rng, device=problem.device).mul_(shape[1] ** -0.5)
            for shape in _shapes(problem)
        ] + [torch.randn(bias.shape[1], generator=rng, device=problem.device) for bias in _biases(problem, 0)]
