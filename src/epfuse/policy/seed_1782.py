"""Policy `seed-1782`: the gates of InferenceX pull request 1782 and of pull request 1753, on which it is stacked.

They belong to one profiled configuration, MiniMax-M3 on gfx94x. What they do is a table, `BRANCHES`; what they ask
first is another one, `GATES`. A layer that fails a gate is untouched, and the plan says which gate.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from epfuse.arguments import checks_enums
from epfuse.config import Bias, Path, Policy, SwiGLUOAI
from epfuse.policy.layer import LayerPlan, LayerRequest, Storage
from epfuse.policy.ranges import Route, token_ranges
from epfuse.target import Target
from epfuse.weights.checkpoint_format import Checkpoint

SHORT_CONTEXT = 4096
"""The longest ``max_model_len`` that counts as short."""
FEW_TOKENS = 8
"""BF16 up to here, where a layer keeps both."""
MANY_TOKENS = 832
"""BF16 from here on, where a layer keeps both."""
BF16_LAYER_STRIDE = 5
"""At EP1 and long context a layer whose index is a multiple of this keeps BF16 alone."""


@dataclass(frozen=True)
class Condition:
    """One condition of the profiled configuration.

    Attributes:
        name: what is asked.
        value: reads it from a request.
        allowed: the values that pass.
    """

    name: str
    value: Callable[[LayerRequest], object]
    allowed: tuple[object, ...]

    def refusal(self, request: LayerRequest) -> str | None:
        """One sentence if the request does not pass."""
        value = self.value(request)
        if value in self.allowed:
            return None
        return f"{self.name} is {_shown(value)}; the profiled layer has {' or '.join(map(_shown, self.allowed))}."


GATES = (
    Condition("The target", lambda request: request.target, (Target.GFX942,)),
    Condition("E", lambda request: request.shape.experts, (128,)),
    Condition("K", lambda request: request.shape.top_k, (4,)),
    Condition("H", lambda request: request.shape.hidden, (6144,)),
    Condition("The model's I", lambda request: request.model_intermediate, (3072,)),
    Condition("The number of shared experts", lambda request: request.shared_experts, (1,)),
    Condition("The EP size", lambda request: request.ep_size, (1, 8)),
    # Not named in the pull request, whose one model fixes both.
    Condition("The checkpoint", lambda request: request.checkpoint, (Checkpoint.MXFP8,)),
    Condition("The activation", lambda request: request.activation, (SwiGLUOAI(),)),
    Condition("The projections' bias", lambda request: request.bias, (Bias.NONE,)),
)


def _shown(value: object) -> str:
    return str(value.value) if isinstance(value, enum.Enum) else str(value)


MIXED = (
    Route(
        FEW_TOKENS,
        Path.BF16,
        f"Up to {FEW_TOKENS} tokens the seed takes the BF16 experts that it retains.",
        f"The seed takes BF16 up to {FEW_TOKENS} tokens.",
    ),
    Route(
        MANY_TOKENS - 1,
        Path.W8A8,
        f"Between {FEW_TOKENS} and {MANY_TOKENS} tokens the seed takes native MXFP8.",
        f"The seed takes native MXFP8 between {FEW_TOKENS} and {MANY_TOKENS} tokens.",
    ),
    Route(
        None,
        Path.BF16,
        f"From {MANY_TOKENS} tokens on the seed takes the BF16 experts that it retains.",
        f"The seed takes BF16 from {MANY_TOKENS} tokens on.",
    ),
)
SPARSE_BF16 = (
    Route(
        None,
        Path.BF16,
        "The seed computes local routes alone in BF16, with SwiGLU in the first GEMM.",
        "The seed has BF16 for every token count here.",
    ),
)
BF16_ONLY = (
    Route(
        None,
        Path.BF16,
        "The layer keeps BF16 alone.",
        "The seed has BF16 for every token count here.",
    ),
)


@checks_enums
@dataclass(frozen=True)
class Branch:
    """One case of the seed.

    Attributes:
        sentence: what the seed does.
        applies: to which layers that passed the gates; the first branch that applies is taken.
        storage: what such a layer keeps.
        routes: its paths by token count.
    """

    sentence: str
    applies: Callable[[LayerRequest], bool]
    storage: Storage
    routes: tuple[Route, ...]


BRANCHES = (
    Branch(
        f"Short context (max_model_len <= {SHORT_CONTEXT}): native MXFP8 with retained BF16 experts.",
        lambda request: request.max_model_len <= SHORT_CONTEXT,
        Storage.HYBRID,
        MIXED,
    ),
    Branch(
        "Long context at EP8: sparse BF16 with fused SwiGLU.",
        lambda request: request.ep_size == 8,
        Storage.BF16,
        SPARSE_BF16,
    ),
    Branch(
        f"Long context at EP1: every {BF16_LAYER_STRIDE}th layer (index % {BF16_LAYER_STRIDE} == 0) is BF16-only.",
        lambda request: request.layer % BF16_LAYER_STRIDE == 0,
        Storage.BF16,
        BF16_ONLY,
    ),
    Branch(
        f"Long context at EP1: the layers that are not every {BF16_LAYER_STRIDE}th keep both.",
        lambda request: True,
        Storage.HYBRID,
        MIXED,
    ),
)


def plan(request: LayerRequest) -> LayerPlan:
    """What the seed does with one layer; memory is not asked, as the seed does not ask it.

    Args:
        request: the layer.
    """
    for gate in GATES:
        refusal = gate.refusal(request)
        if refusal is not None:
            return LayerPlan(Policy.SEED_1782, request, Storage.UNTOUCHED, refusal)
    branch = next(branch for branch in BRANCHES if branch.applies(request))
    others = tuple(
        (storage, f"The seed keeps {branch.storage.value} here.")
        for storage in (Storage.BF16, Storage.MXFP8, Storage.HYBRID)
        if storage is not branch.storage
    )
    if request.stored not in (None, branch.storage):
        reason = f"What is stored is {_shown(request.stored)}; the seed keeps {branch.storage.value} here."
        return LayerPlan(Policy.SEED_1782, request, Storage.UNTOUCHED, reason)
    ranges = token_ranges(request, branch.storage, branch.routes)
    return LayerPlan(Policy.SEED_1782, request, branch.storage, branch.sentence, ranges, others)
