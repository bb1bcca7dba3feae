"""One MoE layer of a deployment: what every decision about it is made from, whoever asks. Nothing in it is a server's.

The vLLM plugin makes `LayerFacts` from vLLM's objects; `epfuse vllm explain` and `epfuse plan` make the same facts from
a model's config.json, with `model_facts`.
"""

from __future__ import annotations

from dataclasses import dataclass

from epfuse.arguments import checks_enums
from epfuse.config import Activation, LayerShape, SwiGLUOAI
from epfuse.errors import ConfigError
from epfuse.expert_map import experts_of_rank
from epfuse.target import Target
from epfuse.weights.checkpoint_format import Checkpoint
from epfuse.weights.model_config import ExpertModel

GATHERED = "allgather_reducescatter"
"""The exchange that leaves experts as they are: all ranks' tokens come to each call, and its partial sums are added and
scattered afterwards."""


@checks_enums
@dataclass(frozen=True)
class LayerFacts:
    """What is about to be built for one MoE layer on one rank.

    Attributes:
        name: the layer's name in the model.
        layer: its index in the model; 0 where the name has none.
        method: how the weights are quantised, as the server names it.
        own_experts: class of the experts that run the layer if epfuse does not; None where nobody else would.
        checkpoint: the numbers of the weights; None for any that we don't read.
        target: the GPU; None for one that epfuse has no kernels for.
        shape: sizes of one rank's layer; None for a rank that holds no expert.
        tp_size: ranks that I is split over.
        ep_size: ranks that the experts are spread over.
        max_model_len: the longest sequence that is served, tokens.
        shared_experts: experts that every token visits besides its K.
        activation: of the experts; None for one that we don't compute.
        activation_name: the server's word for it.
        dtype: of the activations, as torch names it.
        weights_dtype: of weights that are not quantised.
        asked_backend: the experts that the user asked for; ``auto`` for none.
        has_lora: LoRA adapters are enabled.
        has_eplb: experts are rebalanced while serving.
        has_bias: the projections have biases.
        has_alternating_rows: gate and up rows alternate in w13, as the server keeps it.
        has_fused_shared_experts: shared experts are appended to the routed ones.
        has_masked_expert_map: the server hands every experts class an ownership mask in place of a map.
        weights_input: the router weight is applied to the inputs.
        needs_batch_invariance: results must not depend on the batch.
        all2all: how tokens are exchanged between ranks, as the server names it; None where they stay.
        is_batched: activations come as ``[E, capacity, H]``.
        why_left: why the server's method is better left to it, a sentence; None for no reason.
        device_name: the product, as torch names it, for the tuned tables; None where no device is there to ask.
        max_tokens: the most tokens of a call, those of other ranks among them; None where nobody knows.
    """

    name: str
    layer: int
    method: str
    own_experts: str | None
    checkpoint: Checkpoint | None
    target: Target | None
    shape: LayerShape | None
    tp_size: int
    ep_size: int
    max_model_len: int
    shared_experts: int
    activation: Activation | None
    activation_name: str
    dtype: str = "torch.bfloat16"
    weights_dtype: str = "torch.bfloat16"
    asked_backend: str = "auto"
    has_lora: bool = False
    has_eplb: bool = False
    has_bias: bool = False
    has_alternating_rows: bool = False
    has_fused_shared_experts: bool = False
    has_masked_expert_map: bool = False
    weights_input: bool = False
    needs_batch_invariance: bool = False
    all2all: str | None = None
    is_batched: bool = False
    why_left: str | None = None
    device_name: str | None = None
    max_tokens: int | None = None


@checks_enums
def model_facts(
    model: ExpertModel,
    layer: int,
    *,
    target: Target,
    max_model_len: int,
    ep_size: int = 1,
    tp_size: int = 1,
) -> LayerFacts:
    """The facts of one layer of a model that nothing but its config.json is known of.

    The rank is the first: where ``ep_size`` does not divide the experts it is one of those that hold one more, so it is
    the rank that memory and the longest call depend on.

    Args:
        model: whose experts.
        layer: index of one of its layers with experts.
        target: the GPUs.
        max_model_len: the longest sequence that is served, tokens.
        ep_size: ranks that the experts are spread over.
        tp_size: ranks that I is split over.

    Raises:
        ConfigError: there are more ranks than experts, or ``tp_size`` does not divide I.
    """
    if not 1 <= ep_size <= model.experts:
        raise ConfigError(f"ep_size is {ep_size}; it must be in 1..{model.experts}, the model's experts")
    if tp_size < 1 or model.intermediate % tp_size:
        raise ConfigError(f"tp_size is {tp_size}; it must divide the experts' width, {model.intermediate}")
    activation = model.activation_at(layer)
    return LayerFacts(
        name=f"model.layers.{layer}",
        layer=layer,
        method=model.checkpoint.value,
        own_experts=None,
        checkpoint=model.checkpoint,
        target=target,
        shape=LayerShape(
            hidden=model.hidden,
            intermediate=model.intermediate // tp_size,
            experts=model.experts,
            local_experts=len(experts_of_rank(model.experts, ep_size, 0)),
            top_k=model.top_k,
        ),
        tp_size=tp_size,
        ep_size=ep_size,
        max_model_len=max_model_len,
        shared_experts=model.shared_experts,
        activation=activation,
        activation_name=_activation_name(activation),
        dtype=f"torch.{model.dtype}",
        has_bias=model.has_bias,
        weights_input=model.weights_input,
    )


def _activation_name(activation: Activation | None) -> str:
    if activation is None:
        return "silu with its result clamped"
    if not isinstance(activation, SwiGLUOAI):
        return activation.kind
    return "silu" if (activation.alpha, activation.beta) == (1.0, 0.0) else "swigluoai_uninterleave"
