"""vLLM's experts as vLLM 0.25 calls them: the Triton kernel on BF16 weights, and Marlin on MXFP8 ones.

Both are timed with vLLM's own choice of tiles, its alignment of routes, activation and sum.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch

from epfuse.bench.contender import PEER_TOLERANCE, Contender, ContenderKind
from epfuse.bench.inputs import Inputs
from epfuse.bench.layers import Layer
from epfuse.bench.measure import Call, TimingMethod
from epfuse.bench.roofline import MatrixOperand
from epfuse.bench.weights import LayerWeights
from epfuse.config import WeightFormat, silu_gate
from epfuse.errors import ConfigError, DeviceError, MissingDependency

TRITON = "vLLM TritonExperts"
MARLIN = "vLLM Marlin"


def make_triton(weights: LayerWeights) -> Contender:
    """``TritonExperts``: what vLLM runs for MXFP8 weights where it has no kernel for them, dequantised at load."""
    vllm = _vllm(weights)
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    layer, shape = weights.layer, weights.layer.shape
    dense = weights.dense
    activation, gate = activation_of(vllm, layer, limit_name="gemm1_clamp_limit")
    quant = vllm.FusedMoEQuantConfig.make(**gate)
    experts = TritonExperts(moe_config(vllm, layer, weights.device, activation), quant)

    def bind(inputs: Inputs) -> Call:
        sizes = experts.workspace_shapes(
            inputs.tokens,
            2 * shape.intermediate,
            shape.hidden,
            shape.top_k,
            shape.experts,
            shape.local_experts,
            None,
            activation,
        )
        # poisoned, because vLLM hands over whatever an earlier layer left there
        workspace13, workspace2, out = (
            torch.full((math.prod(size),), torch.nan, dtype=torch.bfloat16, device=weights.device) for size in sizes
        )
        out = out.view(inputs.hidden.shape)

        def call() -> torch.Tensor:
            experts.apply(
                output=out,
                hidden_states=inputs.hidden,
                w1=dense.w13,
                w2=dense.w2,
                topk_weights=inputs.topk_weights,
                topk_ids=inputs.topk_ids,
                activation=activation,
                global_num_experts=shape.experts,
                expert_map=inputs.expert_map.on(inputs.hidden.device),
                a1q_scale=None,
                a2_scale=None,
                workspace13=workspace13,
                workspace2=workspace2,
                expert_tokens_meta=None,
                apply_router_weight_on_input=False,
            )
            return out

        return call

    return _contender(TRITON, "bf16", WeightFormat.DENSE, bind, "fused_moe_kernel on BF16 weights, vLLM's own tiles")


def make_marlin(weights: LayerWeights) -> Contender:
    """``fused_marlin_moe``: weights repacked at load, E4M3 expanded to BF16 in registers."""
    if not weights.quantised:
        raise ConfigError("Marlin's weights are MXFP8, which needs sizes that are multiples of 32")
    vllm = _vllm(weights)
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.scalar_type import scalar_types

    layer, shape = weights.layer, weights.layer.shape
    activation, gate = activation_of(vllm, layer, limit_name="clamp_limit")
    w13, w2, w13_scale, w2_scale = marlin_weights(weights)

    def add_routes(routed: torch.Tensor, out: torch.Tensor, *_: object) -> torch.Tensor:
        ops.moe_sum(routed, out)
        return out

    def bind(inputs: Inputs) -> Call:
        def call() -> torch.Tensor:
            output: torch.Tensor = fused_marlin_moe(
                inputs.hidden,
                w13,
                w2,
                None,
                None,
                w13_scale,
                w2_scale,
                inputs.topk_weights,
                inputs.topk_ids,
                quant_type_id=scalar_types.float8_e4m3fn.id,
                global_num_experts=shape.experts,
                activation=activation,
                moe_sum=add_routes,
                expert_map=inputs.expert_map.on(inputs.hidden.device),
                **gate,
            )
            return output

        return call

    return _contender(MARLIN, "mxfp8", WeightFormat.MXFP8, bind, "fused_marlin_moe on MXFP8 weights, vLLM's own tiles")


def _vllm(weights: LayerWeights) -> Any:
    """The fused_moe package of vLLM, quietly.

    Raises:
        DeviceError: not on a GPU.
        MissingDependency: it is there but can't be imported.
    """
    if weights.device.type != "cuda":
        raise DeviceError("vLLM's expert kernels need a GPU")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm.model_executor.layers.fused_moe as fused_moe
    except ImportError as error:
        raise MissingDependency(f"vllm can't be imported: {str(error).splitlines()[0]}") from None
    return fused_moe


def moe_config(vllm: Any, layer: Layer, device: torch.device, activation: Any) -> Any:
    """What vLLM knows of a layer, as a FusedMoEConfig without parallelism.

    Args:
        vllm: its fused_moe package.
        layer: sizes.
        device: where the experts run.
        activation: from `activation_of`.
    """
    shape = layer.shape
    return vllm.FusedMoEConfig(
        num_experts=shape.experts,
        experts_per_token=shape.top_k,
        hidden_dim=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=shape.local_experts,
        num_logical_experts=shape.experts,
        activation=activation,
        device=str(device),
        routing_method=vllm.RoutingMethodType.Renormalize,
        moe_parallel_config=vllm.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
    )


def marlin_weights(weights: LayerWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """w13, w2 and their scales as vLLM repacks MXFP8 weights for Marlin when it loads them, in new memory."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp8 import prepare_mxfp8_moe_layer_for_marlin

    packed = weights.mxfp8
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as while vLLM loads a model: the scales become the default dtype
    try:
        w13, w2, w13_scale, w2_scale = prepare_mxfp8_moe_layer_for_marlin(
            torch.nn.Module(), packed.w13.values.clone(), packed.w2.values.clone(), packed.w13.scales, packed.w2.scales
        )
    finally:
        torch.set_default_dtype(before)
    return w13, w2, w13_scale, w2_scale


def activation_of(vllm: Any, layer: Layer, limit_name: str) -> tuple[Any, dict[str, float]]:
    """The activation as vLLM names it, and the parameters to hand over."""
    gate = layer.activation
    if gate == silu_gate():
        return vllm.MoEActivation.SILU, {}
    parameters = {"gemm1_alpha": gate.alpha, "gemm1_beta": gate.beta, limit_name: gate.limit}
    return vllm.MoEActivation.SWIGLUOAI_UNINTERLEAVE, parameters


def _contender(name: str, stored: str, form: WeightFormat, bind: Callable[[Inputs], Call], note: str) -> Contender:
    return Contender(
        name, ContenderKind.PEER, stored, form, MatrixOperand.BF16, PEER_TOLERANCE, TimingMethod.GRAPH, bind, note
    )


CONTENDERS = {TRITON: make_triton, MARLIN: make_marlin}
