"""Layers that epfuse does not run whatever the policy says, each with its reason.

The one set of rules, asked of the same `LayerFacts`: `epfuse plan` asks what the layer can compute (`LAYER`), the
plugins and `epfuse vllm explain` ask what is served besides (`REFUSALS`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from epfuse.config import SwiGLUOAI, known_activations
from epfuse.policy.facts import GATHERED, LayerFacts
from epfuse.weights.checkpoint_format import Checkpoint


@dataclass(frozen=True)
class Refusal:
    """One configuration that we don't serve.

    Attributes:
        applies: whether a layer is in it.
        reason: one sentence, from the layer's facts.
    """

    applies: Callable[[LayerFacts], bool]
    reason: Callable[[LayerFacts], str]


_SIZES_AND_NUMBERS = (
    Refusal(
        lambda facts: facts.target is None,
        lambda facts: "epfuse runs on gfx942, gfx950, sm_90 and the CPU, and this device is none of them.",
    ),
    Refusal(
        lambda facts: facts.checkpoint is None,
        lambda facts: f"{facts.method} with {facts.own_experts} is not one of the weight formats that epfuse replaces.",
    ),
    Refusal(lambda facts: facts.shape is None, lambda facts: "this rank holds no expert."),
    Refusal(
        lambda facts: facts.dtype != "torch.bfloat16",
        lambda facts: f"activations are {facts.dtype}; epfuse serves torch.bfloat16.",
    ),
    Refusal(
        lambda facts: facts.checkpoint is Checkpoint.BF16 and facts.weights_dtype != facts.dtype,
        lambda facts: f"weights are {facts.weights_dtype} and activations {facts.dtype}; epfuse needs one for both.",
    ),
    Refusal(lambda facts: facts.weights_input, lambda facts: "the router weight is applied to the inputs."),
)
LAYER = (
    *_SIZES_AND_NUMBERS,
    Refusal(
        lambda facts: facts.activation is None,
        lambda facts: f"the activation is {facts.activation_name!r}; {known_activations()}.",
    ),
)
"""What the layer itself can't compute, whoever calls it."""

REFUSALS = (
    Refusal(
        lambda facts: facts.asked_backend != "auto",
        lambda facts: f"--moe-backend {facts.asked_backend} was asked for, and the user's choice wins.",
    ),
    Refusal(lambda facts: facts.why_left is not None, lambda facts: f"{facts.method} is left alone: {facts.why_left}"),
    *_SIZES_AND_NUMBERS,
    Refusal(
        lambda facts: not isinstance(facts.activation, SwiGLUOAI),
        lambda facts: (
            f"the activation is {facts.activation_name!r}; epfuse serves SwiGLU-OAI, with gate and up rows in turn in"
            " gpt-oss's numbers alone, and silu(gate) * up."
        ),
    ),
    Refusal(
        lambda facts: facts.has_masked_expert_map,
        lambda facts: (
            "this vLLM hands out a 0/1 mask as expert map while VLLM_ROCM_USE_AITER=1 (vLLM issue 49758); as"
            " a map it gives wrong results."
        ),
    ),
    Refusal(lambda facts: facts.has_lora, lambda facts: "LoRA is enabled, which epfuse does not serve yet."),
    Refusal(
        lambda facts: facts.has_eplb,
        lambda facts: "EPLB moves experts between ranks while serving, which epfuse does not serve yet.",
    ),
    Refusal(
        lambda facts: facts.has_fused_shared_experts, lambda facts: "shared experts are fused into the routed ones."
    ),
    Refusal(
        lambda facts: facts.needs_batch_invariance,
        lambda facts: "VLLM_BATCH_INVARIANT=1 asks for results that don't depend on the batch; epfuse's tiles do.",
    ),
    Refusal(
        lambda facts: facts.is_batched,
        lambda facts: f"{facts.all2all} brings activations as [E, capacity, H], which epfuse does not serve yet.",
    ),
    Refusal(
        lambda facts: facts.all2all not in (None, GATHERED),
        lambda facts: f"tokens are exchanged by {facts.all2all}, which epfuse does not serve yet.",
    ),
)
"""What servers' plugins leave alone, in the order in which it is asked; the first that applies is the reason."""


def layer_refusal(facts: LayerFacts) -> str | None:
    """Why epfuse can't compute the layer at all; None if it can."""
    return _first(LAYER, facts)


def refusal(facts: LayerFacts) -> str | None:
    """Why a server's plugin does not run the layer; None if nothing speaks against it."""
    return _first(REFUSALS, facts)


def _first(rules: Sequence[Refusal], facts: LayerFacts) -> str | None:
    return next((rule.reason(facts) for rule in rules if rule.applies(facts)), None)
