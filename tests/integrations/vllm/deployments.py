"""MoE layers of pretended deployments, built by vLLM's own code on tensors without data."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import vllm.config
import vllm.platforms
from vllm.config import CompilationConfig
from vllm.model_executor import custom_op, parameter
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager, determine_expert_map
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_mxfp8,
)
from vllm.model_executor.layers.quantization.modelopt import ModelOptMxFp8Config
from vllm.model_executor.layers.quantization.online import fp8  # noqa: F401  (asks the platform when it is imported)

from epfuse.integrations.vllm import versions
from epfuse.integrations.vllm.stand_in import EpfuseRoutedExperts
from epfuse.target import Target, planning_for

NAME = "model.layers.7.block_sparse_moe.experts"


@dataclass(frozen=True)
class Deployment:
    """MiniMax-M3 on eight MI300X with expert parallelism, unless something is replaced."""

    target: Target = Target.GFX942
    quantization: str | None = "modelopt"
    hidden: int = 6144
    intermediate: int = 3072
    experts: int = 128
    top_k: int = 4
    ep_size: int = 8
    ep_rank: int = 0
    tp_size: int = 1
    tp_rank: int = 0
    activation: str = "swigluoai_uninterleave"
    alpha: float | None = 1.702
    beta: float | None = 1.0
    limit: float | None = 7.0
    moe_limit: float | None = None
    max_model_len: int = 9472
    shared_experts: int = 1
    backend: str = "auto"
    lora: bool = False
    eplb: bool = False
    dp_size: int = 1
    all2all: str = "allgather_reducescatter"
    dtype: torch.dtype = torch.bfloat16
    weights_dtype: torch.dtype = torch.bfloat16
    device: str = "meta"
    bias: bool = False
    fused_shared_experts: int = 0
    weights_input: bool = False

    def but(self, **changes: Any) -> Deployment:
        return replace(self, **changes)


M3_EP8 = Deployment()


class CompressedTensors(ModelOptMxFp8Config):
    """Hands out the compressed-tensors method without its scheme files."""

    def get_quant_method(self, layer, prefix):
        return compressed_tensors_moe_w8a8_mxfp8.CompressedTensorsW8A8Mxfp8MoEMethod(layer.moe_config)


class Online(ModelOptMxFp8Config):
    """Hands out the method that quantises BF16 checkpoints while loading."""

    def get_quant_method(self, layer, prefix):
        from vllm.model_executor.layers.quantization.online.mxfp8 import Mxfp8OnlineMoEMethod

        takes_config = "moe" in inspect.signature(Mxfp8OnlineMoEMethod.__init__).parameters
        return Mxfp8OnlineMoEMethod(**({"moe": layer.moe_config} if takes_config else {"layer": layer}))


QUANTIZATIONS = {"modelopt": ModelOptMxFp8Config, "compressed-tensors": CompressedTensors, "online": Online}


def parallel_config(deployment: Deployment) -> FusedMoEParallelConfig:
    ep = deployment.ep_size > 1
    changes = {
        "ep_size": deployment.ep_size,
        "ep_rank": deployment.ep_rank,
        "use_ep": ep,
        "tp_size": deployment.tp_size,
        "tp_rank": deployment.tp_rank,
        "dp_size": deployment.dp_size,
        "enable_eplb": deployment.eplb,
        "all2all_backend": deployment.all2all,
    }
    return replace(FusedMoEParallelConfig.make_no_parallel(), **changes)


def local_experts(deployment: Deployment) -> int:
    """How many experts vLLM gives to the rank."""
    found, *_ = determine_expert_map(deployment.ep_size, deployment.ep_rank, deployment.experts)
    return int(found)


def moe_config(deployment: Deployment) -> FusedMoEConfig:
    return FusedMoEConfig(
        num_experts=deployment.experts,
        experts_per_token=deployment.top_k,
        hidden_dim=deployment.hidden,
        intermediate_size=deployment.intermediate,
        num_local_experts=local_experts(deployment),
        num_logical_experts=deployment.experts,
        activation=MoEActivation.from_str(deployment.activation),
        device=deployment.device,
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=parallel_config(deployment),
        in_dtype=deployment.dtype,
        moe_backend=deployment.backend,
        is_lora_enabled=deployment.lora,
        has_bias=deployment.bias,
        swiglu_limit=deployment.limit if deployment.moe_limit is None else deployment.moe_limit,
        swiglu_alpha=deployment.alpha,
        swiglu_beta=deployment.beta,
    )


def build(deployment: Deployment, monkeypatch, layer_cls: type = EpfuseRoutedExperts) -> RoutedExperts:
    """The layer as vLLM builds it in that deployment."""
    vllm.platforms._current_platform.become(deployment.target)
    if deployment.device == "cpu":  # with data: the CPU's tensors stand for the GPU's
        monkeypatch.setattr(versions, "target_of", lambda device: deployment.target)
    model = SimpleNamespace(
        max_model_len=deployment.max_model_len,
        hf_text_config=SimpleNamespace(n_shared_experts=deployment.shared_experts),
    )
    monkeypatch.setattr(vllm.config, "get_current_vllm_config_or_none", lambda: SimpleNamespace(model_config=model))
    monkeypatch.setattr(custom_op, "get_cached_compilation_config", lambda: CompilationConfig(custom_ops=["all"]))
    # a rank of a group that was never formed
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    quant_config = None
    if deployment.quantization is not None:
        quant_config = QUANTIZATIONS[deployment.quantization](True, None, [])
    config = moe_config(deployment)
    manager = ExpertMapManager(
        max_num_batched_tokens=8192,
        top_k=deployment.top_k,
        global_num_experts=deployment.experts,
        num_redundant_experts=0,
        num_expert_group=None,
        moe_parallel_config=config.moe_parallel_config,
        placement_strategy="linear",
        enable_eplb=deployment.eplb,
    )
    # set afterwards: the manager would make AITER's mask on a GPU
    manager.num_fused_shared_experts = deployment.fused_shared_experts
    with planning_for(deployment.target), torch.device(deployment.device):
        return layer_cls(
            NAME,
            deployment.weights_dtype,
            config,
            quant_config,
            expert_map_manager=manager,
            swiglu_limit=deployment.limit,
            swiglu_alpha=deployment.alpha,
            swiglu_beta=deployment.beta,
            apply_router_weight_on_input=deployment.weights_input,
        )
