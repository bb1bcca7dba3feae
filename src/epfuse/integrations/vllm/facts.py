"""One MoE layer of a deployment, in epfuse's words: what every decision about it is made from."""

from __future__ import annotations

from dataclasses import dataclass

from epfuse.config import LayerShape, SwiGLUOAI
from epfuse.target import Target
from epfuse.weights.checkpoint_format import Checkpoint


@dataclass(frozen=True)
class LayerFacts:
    """What vLLM is about to build for one MoE layer.

    Attributes:
        name: the layer's name in the model.
        layer: its index in the model; 0 where the name has none.
        method: vLLM's quantisation method, its class name.
        own_experts: the experts class that vLLM chose, its name.
        checkpoint: the numbers of the weights; None for any that we don't read.
        target: the GPU; None for one that epfuse has no kernels for.
        shape: sizes of one rank's layer.
        tp_size: ranks that I is split over.
        ep_size: ranks that the experts are spread over.
        max_model_len: the longest sequence that is served, tokens.
        shared_experts: experts that every token visits besides its K.
        activation: of the experts; None for one that we don't compute.
        activation_name: vLLM's word for it.
        dtype: of the activations, as torch names it.
        asked_backend: the user's ``--moe-backend``.
        has_lora: LoRA adapters are enabled.
        has_eplb: experts are rebalanced while serving.
        has_bias: the projections have biases.
        has_fused_shared_experts: shared experts are appended to the routed ones.
        has_masked_expert_map: vLLM hands every experts class an ownership mask in place of a map.
        weights_input: the router weight is applied to the inputs.
        needs_batch_invariance: results must not depend on the batch.
        all2all: name of the all-to-all backend in use; None where tokens stay where they are.
        is_batched: activations come as ``[E, capacity, H]``.
    """

    name: str
    layer: int
    method: str
    own_experts: str
    checkpoint: Checkpoint | None
    target: Target | None
    shape: LayerShape
    tp_size: int
    ep_size: int
    max_model_len: int
    shared_experts: int
    activation: SwiGLUOAI | None
    activation_name: str
    dtype: str
    asked_backend: str = "auto"
    has_lora: bool = False
    has_eplb: bool = False
    has_bias: bool = False
    has_fused_shared_experts: bool = False
    has_masked_expert_map: bool = False
    weights_input: bool = False
    needs_batch_invariance: bool = False
    all2all: str | None = None
    is_batched: bool = False
