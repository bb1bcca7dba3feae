"""route -> gate_up -> down -> combine in plain PyTorch: the oracle of every family."""

from __future__ import annotations

import torch
from torch.profiler import record_function

from epfuse.config import Activation
from epfuse.expert_map import ExpertMap
from epfuse.stages.combine import reference as combine_reference
from epfuse.stages.down import reference as down_reference
from epfuse.stages.gate_up import reference as gate_up_reference
from epfuse.stages.route import reference as route_reference
from epfuse.weights.experts import ExpertWeights


def run_reference(
    hidden: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: ExpertMap,
    activation: Activation,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The layer in plain PyTorch, on any device and weights of any format.

    Neither autocast nor the weights' ``requires_grad`` changes the result: kernels don't ask for them either, and there
    is no backward. Operands are taken to fit; `fused_experts` checks them.

    Args:
        hidden: ``[T, H]`` bfloat16, float16 or float32.
        weights: of L experts, w13 ``[L, 2I, H]`` and w2 ``[L, H, I]``, in any format, and their biases.
        topk_weights: ``[T, K]`` float32.
        topk_ids: ``[T, K]`` int32 or int64, global expert ids; -1 and ids outside [0, E) are skipped.
        expert_map: of E experts, with L local ones.
        activation: between the two GEMMs.
        compute: float32 rounds where the kernels round. float64 rounds nowhere: the oracle of every path.

    Returns:
        ``[T, H]``, this rank's part: in hidden's dtype, or float64 where ``compute`` is.

    Raises:
        ConfigError: the weights are consumed.

    Host syncs: yes; not graph-capturable.
    """
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return _reference(hidden, weights, topk_weights, topk_ids, expert_map, activation, compute)


def _reference(
    hidden: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: ExpertMap,
    activation: Activation,
    compute: torch.dtype,
) -> torch.Tensor:
    experts = weights.reference_experts
    slots = expert_map.on(hidden.device)
    with record_function("epfuse::route"):
        routes = route_reference.route(topk_ids, slots, weights.local_experts, block_m=1)
    with record_function("epfuse::gate_up"):
        first = (hidden, experts.w13, routes, topk_ids.shape[1], activation, compute, weights.gate_up_bias)
        y = gate_up_reference.gate_up(*first)
    with record_function("epfuse::down"):
        routed = down_reference.down(y, experts.w2, routes, topk_weights, compute, weights.down_bias)
    with record_function("epfuse::combine"):
        dtype = torch.float64 if compute == torch.float64 else hidden.dtype
        return combine_reference.combine(routed, topk_ids, slots, dtype, compute)
