"""Every kernel that the calls of a layer can launch, as Triton tells them apart."""

from __future__ import annotations

import functools
import inspect
import itertools
from dataclasses import replace

import torch

from epfuse.aot.launches import Launch, launches_of
from epfuse.api import fused_experts
from epfuse.arguments import integer
from epfuse.config import WeightFormat, silu_gate
from epfuse.expert_map import ExpertMap
from epfuse.families.family import CallKind
from epfuse.policy.call import running_table
from epfuse.stages.extent import ADDRESSABLE
from epfuse.weights.experts import ExpertWeights


def kernels(kind: CallKind, max_tokens: int) -> tuple[Launch, ...]:
    """Every kernel that calls of 1 to ``max_tokens`` tokens launch, each once. Nothing is compiled.

    Operands of `fused_experts` may lie anywhere and be views of anything: launchers see to it that the kernels do not
    depend on it (`epfuse.stages.extent`). Weights are taken to begin at multiples of 16 bytes, and ids to be int32.

    Args:
        kind: of the calls, on a GPU that need not be there; AUTO will do as path.
        max_tokens: the largest T.

    Raises:
        ConfigError: max_tokens is no integer, or less than 1.
        UnsupportedTarget: the target can't run the calls so.
    """
    counts = token_counts(kind, integer("max_tokens", max_tokens, least=1))
    found = launches_of(kind.target, functools.partial(run_calls, kind, counts), kind.device)
    return tuple(dict.fromkeys(found))


def run_calls(kind: CallKind, counts: list[int]) -> None:
    """A call of each T, on the meta device; only where that stands for the calls' GPU (`planning_for`)."""
    shape = kind.shape
    experts, local = shape.experts, shape.local_experts
    slots = torch.full((experts,), -1, dtype=torch.int32, device="cpu")
    slots[:local] = torch.arange(local, dtype=torch.int32, device="cpu")
    expert_map, weights = ExpertMap(slots), _weights(kind)
    activations = [
        kind.activation(*[1.0] * len(inspect.signature(kind.activation).parameters))
    ]  # any: kernels take them
    if activations[0].bounded and WeightFormat.ROW_FP8 in kind.formats:
        activations.append(silu_gate())  # not bounded: other kernels of the same family
    for tokens, activation in itertools.product(counts, activations):
        fused_experts(
            torch.empty(tokens, shape.hidden, dtype=kind.dtype, device="meta"),
            weights,
            torch.empty(tokens, shape.top_k, dtype=torch.float32, device="meta"),
            torch.empty(tokens, shape.top_k, dtype=torch.int32, device="meta"),
            expert_map,
            activation=activation,
            path=kind.path,
            combine=kind.combine,
        )


def token_counts(kind: CallKind, max_tokens: int) -> list[int]:
    """Values of T that reach every kernel of calls up to ``max_tokens``.

    The first and the last T of every choice of tiles, the powers of two, which the sizes of the routing kernels and of
    combine follow, and on AMD where a tensor outgrows 2 GiB.
    """
    table = running_table(kind)
    chosen = {max_tokens, *(1 << power for power in range(max_tokens.bit_length()))}
    chosen |= {first + before for first in table.first_tokens for before in (-1, 0)}
    if kind.target.is_amd:
        chosen |= {ADDRESSABLE // size + after for size in _bytes_of_a_token(kind) for after in (0, 1)}
    return sorted(tokens for tokens in chosen if 1 <= tokens <= max_tokens)


def _bytes_of_a_token(kind: CallKind) -> set[int]:
    """Bytes of a token in each tensor that grows with T."""
    shape, item = kind.shape, kind.dtype.itemsize
    rows = {shape.hidden, shape.intermediate, 2 * shape.intermediate}
    scales = {-(-size // group) for size in rows for group in (32, 128)}
    each = {size * bytes_ for size in rows for bytes_ in (1, item, 4)} | scales
    return each | {size * shape.top_k for size in each} | {4 * shape.top_k, 8 * shape.top_k}


def _weights(kind: CallKind) -> ExpertWeights:
    """All that is kept, without data."""
    what = (kind.shape, kind.dtype, kind.activation, kind.bias)
    made = [ExpertWeights.without_data(form, *what) for form in kind.formats]
    return replace(made[0], formats=tuple(experts for weights in made for experts in weights.formats))
