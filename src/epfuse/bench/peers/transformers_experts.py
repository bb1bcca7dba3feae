"""transformers' experts: the model's own module, with each of the library's ways to run it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from epfuse.bench.contender import PEER_TOLERANCE, Contender, ContenderKind
from epfuse.bench.inputs import Inputs
from epfuse.bench.measure import Call, TimingMethod
from epfuse.bench.roofline import MatrixOperand
from epfuse.bench.weights import LayerWeights
from epfuse.config import SwiGLUOAI, WeightFormat, silu_gate
from epfuse.errors import ConfigError, MissingDependency

WAYS = {
    "eager": "the module's own loop over the experts that were hit, which syncs with the device",
    "grouped_mm": "transformers.integrations.moe: rows of all routes sorted, torch's grouped product on the local ones",
}


def make(way: str, weights: LayerWeights) -> Contender:
    """MiniMax-M3's experts for its activation, Qwen3-MoE's for silu.

    Raises:
        MissingDependency: this transformers lacks the module or the way.
        ConfigError: no module has this activation.
    """
    experts = _module(weights, way)
    local = weights.layer.shape.local_experts

    def bind(inputs: Inputs) -> Call:
        slots = inputs.expert_map.on(inputs.hidden.device)

        def call() -> torch.Tensor:
            # what the library's expert parallelism does: local ids, others' routes to an id past the last, weight 0
            slot = slots[inputs.topk_ids.long()].long()
            remote = slot < 0
            with torch.no_grad():
                output: torch.Tensor = experts(
                    inputs.hidden, slot.masked_fill(remote, local), inputs.topk_weights.masked_fill(remote, 0.0)
                )
            return output

        return call

    captured = weights.device.type == "cuda" and way != "eager"
    return Contender(
        name=f"transformers {way}",
        kind=ContenderKind.PEER,
        weights="bf16",
        form=WeightFormat.DENSE,
        operand=MatrixOperand.BF16,
        tolerance=PEER_TOLERANCE,
        method=TimingMethod.GRAPH if captured else TimingMethod.PLAIN,
        bind=bind,
        note=WAYS[way],
    )


def _module(weights: LayerWeights, way: str) -> nn.Module:
    """The experts module of a model with this activation, holding our BF16 weights."""
    layer = weights.layer
    shape = layer.shape
    # no memory for parameters that are replaced at once
    with torch.device("meta"):
        module: Any
        if layer.activation == silu_gate():
            module = _qwen3(shape.local_experts, shape.hidden, shape.intermediate)
        elif layer.activation == SwiGLUOAI():
            module = _minimax_m3(shape.local_experts, shape.hidden, shape.intermediate)
        else:
            raise ConfigError(f"no experts of transformers have the activation {layer.activation}")
    dense = weights.dense
    module.gate_up_proj = nn.Parameter(dense.w13, requires_grad=False)
    module.down_proj = nn.Parameter(dense.w2, requires_grad=False)
    module.config._experts_implementation = way
    # the sorted rows of remote routes are uninitialised memory, which only then is masked
    module._is_expert_parallel = True
    assert isinstance(module, nn.Module)
    return module


def _minimax_m3(experts: int, hidden: int, intermediate: int) -> object:
    try:
        from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
        from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
    except ImportError:
        raise MissingDependency("this transformers has no MiniMax-M3 (5.23 has): pip install 'epfuse[demo]'") from None
    config = MiniMaxM3VLTextConfig(
        num_local_experts=experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        swiglu_alpha=SwiGLUOAI().alpha,
        swiglu_limit=SwiGLUOAI().limit,
    )
    return MiniMaxM3VLExperts(config)


def _qwen3(experts: int, hidden: int, intermediate: int) -> object:
    try:
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError:
        raise MissingDependency("this transformers has no Qwen3-MoE experts: pip install 'epfuse[demo]'") from None
    return Qwen3MoeExperts(
        Qwen3MoeConfig(num_experts=experts, hidden_size=hidden, moe_intermediate_size=intermediate, hidden_act="silu")
    )


CONTENDERS: dict[str, Callable[[LayerWeights], Contender]] = {f"transformers {way}": partial(make, way) for way in WAYS}
