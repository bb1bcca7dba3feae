"""The inputs of the calls that are timed in turn."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

import torch

from epfuse.arguments import checks_enums
from epfuse.bench.layers import Layer
from epfuse.bench.roofline import CallWork, MatrixOperand
from epfuse.bench.routing import Routing
from epfuse.config import WeightFormat
from epfuse.expert_map import ExpertMap
from epfuse.target import Target, target_of
from epfuse.weights.formats import BYTES_PER_WEIGHT

HIDDEN_STD = 3.0
"""Of the activations. The projections then have it too, and the clamp at 7 bites on 1 % of the gates and 2 % of the
ups: who forgets it is found out."""

MOST_VARIANTS = 16

CACHES = 3.0
"""How many times the last cache the calls in turn must read, so that no weight is left in it from the call before."""

INFINITY_CACHE = 256 << 20
"""Bytes of the cache behind MI300X's and MI355X's L2, which torch does not report (AMD CDNA 3 and 4 data sheets)."""


@dataclass(frozen=True)
class Inputs:
    """One call's inputs on this rank, and what they ask for.

    Attributes:
        hidden: ``[T, H]`` BF16.
        topk_weights: ``[T, K]`` float32; a token's sum to 1.
        topk_ids: ``[T, K]`` int32 global ids, all of them experts.
        expert_map: of this rank, the first.
        rows: local routes.
        active: local experts with a row, ascending.
    """

    hidden: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: ExpertMap
    rows: int
    active: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """T."""
        return self.hidden.shape[0]

    @checks_enums
    def work(self, layer: Layer, form: WeightFormat, operand: MatrixOperand) -> CallWork:
        """What this call has to do with weights in ``form``."""
        weights = len(self.active) * layer.expert_weights
        return CallWork(weights * BYTES_PER_WEIGHT[form], 2.0 * self.rows * layer.expert_weights, operand)


def draw_inputs(
    layer: Layer, routing: Routing, tokens: int, seed: int, device: torch.device, cache_bytes: int
) -> list[Inputs]:
    """Inputs to be run in turn, reproducible from ``seed``.

    There are eight where a call has few routes, because the number of experts that they hit varies from draw to draw;
    two where it has many; and as many more, up to 16, as it takes for the weights that they read to exceed the last
    cache three times. A draw without a local route is drawn again: it would time a layer that does nothing.

    Args:
        layer: sizes.
        routing: who goes where.
        tokens: T.
        seed: of activations and routings.
        device: where they go.
        cache_bytes: of the last cache, from `cache_bytes_of`.
    """
    expert_map = ExpertMap.contiguous(layer.shape.experts, layer.ep_size, 0, device)
    least = least_variants(layer, tokens)
    smallest = layer.expert_weights * min(BYTES_PER_WEIGHT.values())
    drawn: list[Inputs] = []
    while len(drawn) < MOST_VARIANTS:
        drawn.append(_draw(layer, routing, tokens, seed, len(drawn), expert_map, device))
        read = len({expert for inputs in drawn for expert in inputs.active})
        everything = read == layer.shape.local_experts  # more draws can't read anything else
        if len(drawn) >= least and (everything or read * smallest > CACHES * cache_bytes):
            break
    return drawn


def least_variants(layer: Layer, tokens: int) -> int:
    """Calls that are timed in turn, at the least: more where few routes hit few experts."""
    return max(2, min(8, 512 // (tokens * layer.shape.top_k)))


def least_bytes(layer: Layer, tokens: tuple[int, ...]) -> int:
    """What a run holds at the least, in bytes: one copy of the weights, and one call's activations and oracle."""
    shape = layer.shape
    token = 12 * shape.hidden + 16 * shape.top_k  # float32 activations and a float64 oracle; weights and ids
    return layer.expert_weights * shape.local_experts + max(tokens) * token


@checks_enums
def rotated_bytes(drawn: list[Inputs], layer: Layer, form: WeightFormat) -> float:
    """Bytes of the different experts that calls in turn read."""
    return len({e for inputs in drawn for e in inputs.active}) * layer.expert_weights * BYTES_PER_WEIGHT[form]


def cache_bytes_of(device: torch.device) -> int:
    """Size of the last cache before memory; 0 if it is not known."""
    if device.type == "cuda":
        known = INFINITY_CACHE if target_of(device) in (Target.GFX942, Target.GFX950) else 0
        return max(known, int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)))
    try:
        return max(0, os.sysconf("SC_LEVEL3_CACHE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return 0


def _draw(
    layer: Layer,
    routing: Routing,
    tokens: int,
    seed: int,
    variant: int,
    expert_map: ExpertMap,
    device: torch.device,
) -> Inputs:
    shape = layer.shape
    slots = expert_map.on(torch.device("cpu"))
    rng = torch.Generator()
    for attempt in itertools.count():
        rng.manual_seed(((seed * 1_000_003 + tokens) * 101 + variant) * 1009 + attempt)
        ids = routing.draw(shape, tokens, variant, rng)
        local = slots[ids]
        if bool((local >= 0).any()):
            break
    scores = torch.rand(tokens, shape.top_k, generator=rng) + 0.1
    hidden = HIDDEN_STD * torch.randn(tokens, shape.hidden, generator=rng)
    return Inputs(
        hidden=hidden.to(device, torch.bfloat16),
        topk_weights=(scores / scores.sum(dim=1, keepdim=True)).to(device),
        topk_ids=ids.to(device, torch.int32),
        expert_map=expert_map,
        rows=int((local >= 0).sum()),
        active=tuple(sorted(set(local[local >= 0].tolist()))),
    )
