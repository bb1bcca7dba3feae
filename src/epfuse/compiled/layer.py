"""Every kernel that the calls of a layer can launch, as Triton tells them apart."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import torch

from epfuse.aot.launches import Launch, launches_of
from epfuse.api import fused_experts
from epfuse.arguments import checks_enums, integer
from epfuse.config import Activation, Bias, Combine, LayerShape, Path, SwiGLUOAI, WeightFormat
from epfuse.expert_map import ExpertMap
from epfuse.policy.call import call_table
from epfuse.stages.extent import ADDRESSABLE
from epfuse.target import REFERENCE_DEVICE, Target
from epfuse.weights.experts import ExpertWeights


@checks_enums
@dataclass(frozen=True)
class CompiledLayer:
    """What the kernels of a layer depend on, but for the tokens of a call.

    Attributes:
        target: a GPU, which need not be there.
        product: as torch names it, for the tuned tables.
        path: what calls ask for; AUTO too.
        formats: the weights that are kept.
        shape: the layer's sizes.
        dtype: of the activations.
        ids: of ``topk_ids``: int32 or int64.
        combine: how routes are summed.
        activation: between the two GEMMs; its parameters are run-time arguments.
        bias: of both projections, or of none.
    """

    target: Target
    product: str
    path: Path
    formats: frozenset[WeightFormat]
    shape: LayerShape
    dtype: torch.dtype = torch.bfloat16
    ids: torch.dtype = torch.int32
    combine: Combine = Combine.DETERMINISTIC
    activation: Activation = field(default_factory=SwiGLUOAI)
    bias: Bias = Bias.NONE

    @classmethod
    def on(cls, target: Target, path: Path, formats: frozenset[WeightFormat], shape: LayerShape) -> CompiledLayer:
        """On the target's `REFERENCE_DEVICE`, in BF16."""
        return cls(target, REFERENCE_DEVICE[target], path, formats, shape)


def kernels(layer: CompiledLayer, max_tokens: int) -> tuple[Launch, ...]:
    """Every kernel that calls of 1 to ``max_tokens`` tokens launch, each once. Nothing is compiled.

    Operands of `fused_experts` may lie anywhere and be views of anything: launchers see to it that the kernels do not
    depend on it (`epfuse.stages.extent`). Weights are taken to begin at multiples of 16 bytes.

    Args:
        layer: whose calls.
        max_tokens: the largest T.

    Raises:
        ConfigError: max_tokens is no integer, or less than 1.
        UnsupportedTarget: the target can't run the layer so.
    """
    counts = token_counts(layer, integer("max_tokens", max_tokens, least=1))
    found = launches_of(layer.target, functools.partial(run_calls, layer, counts), layer.product)
    return tuple(dict.fromkeys(found))


def run_calls(layer: CompiledLayer, counts: list[int]) -> None:
    """A call of each T, on the meta device; only where that stands for the layer's GPU (`planning_for`)."""
    experts, local = layer.shape.experts, layer.shape.local_experts
    slots = torch.full((experts,), -1, dtype=torch.int32, device="cpu")
    slots[:local] = torch.arange(local, dtype=torch.int32, device="cpu")
    expert_map, weights = ExpertMap(slots), _weights(layer)
    for tokens in counts:
        fused_experts(
            torch.empty(tokens, layer.shape.hidden, dtype=layer.dtype, device="meta"),
            weights,
            torch.empty(tokens, layer.shape.top_k, dtype=torch.float32, device="meta"),
            torch.empty(tokens, layer.shape.top_k, dtype=layer.ids, device="meta"),
            expert_map,
            activation=layer.activation,
            path=layer.path,
            combine=layer.combine,
        )


def token_counts(layer: CompiledLayer, max_tokens: int) -> list[int]:
    """Values of T that reach every kernel of calls up to ``max_tokens``.

    The first and the last T of every choice of tiles, the powers of two, which the sizes of the routing kernels and of
    combine follow, and on AMD where a tensor outgrows 2 GiB.
    """
    table = call_table(
        layer.path,
        layer.target,
        layer.shape,
        layer.formats,
        layer.dtype,
        layer.combine,
        layer.product,
        type(layer.activation),
        layer.bias,
    )
    chosen = {max_tokens, *(1 << power for power in range(max_tokens.bit_length()))}
    chosen |= {first + before for first in table.first_tokens for before in (-1, 0)}
    if layer.target.is_amd:
        chosen |= {ADDRESSABLE // size + after for size in _bytes_of_a_token(layer) for after in (0, 1)}
    return sorted(tokens for tokens in chosen if 1 <= tokens <= max_tokens)


def _bytes_of_a_token(layer: CompiledLayer) -> set[int]:
    """Bytes of a token in each tensor that grows with T."""
    shape, item = layer.shape, layer.dtype.itemsize
    rows = {shape.hidden, shape.intermediate, 2 * shape.intermediate}
    scales = {-(-size // group) for size in rows for group in (32, 128)}
    each = {size * bytes_ for size in rows for bytes_ in (1, item, 4)} | scales
    return each | {size * shape.top_k for size in each} | {4 * shape.top_k, 8 * shape.top_k}


def _weights(layer: CompiledLayer) -> ExpertWeights:
    """All that is kept, without data."""
    kind = (layer.shape, layer.dtype, type(layer.activation), layer.bias)
    made = [ExpertWeights.without_data(form, *kind) for form in layer.formats]
    return replace(made[0], formats=tuple(experts for weights in made for experts in weights.formats))
