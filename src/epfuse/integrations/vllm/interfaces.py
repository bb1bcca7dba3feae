"""All that epfuse uses of vLLM."""

from __future__ import annotations

from pathlib import Path

from epfuse.integrations.interfaces import InterfaceUse, ServerProject, What, names_in

LAYERS = "model_executor/layers/"
MOE = f"{LAYERS}fused_moe/"
QUANT = f"{LAYERS}quantization/"

USES = (
    names_in("config/vllm.py", "", "get_current_vllm_config_or_none"),
    names_in("envs.py", "", "VLLM_BATCH_INVARIANT"),
    names_in("model_executor/custom_op.py", "", "op_registry_oot"),
    InterfaceUse(What.PARAMETERS, "model_executor/custom_op.py", "PluggableLayer.register_oot"),
    InterfaceUse(What.PARAMETERS, "model_executor/utils.py", "replace_parameter"),
    InterfaceUse(What.PARAMETERS, f"{MOE}routed_experts.py", "RoutedExperts.__init__"),
    InterfaceUse(What.PARAMETERS, f"{MOE}routed_experts.py", "RoutedExperts._get_quant_method"),
    InterfaceUse(What.PARAMETERS, f"{MOE}routed_experts.py", "RoutedExperts._map_global_expert_id_to_local_expert_id"),
    InterfaceUse(What.PARAMETERS, f"{MOE}routed_experts.py", "RoutedExperts.weight_loader"),
    names_in(
        f"{MOE}routed_experts.py",
        "RoutedExperts",
        "activation apply_router_weight_on_input expert_map expert_map_manager layer_name params_dtype quant_method"
        " swiglu_alpha swiglu_beta swiglu_limit",
    ),
    names_in(f"{MOE}expert_map_manager.py", "ExpertMapManager", "num_fused_shared_experts"),
    names_in(
        f"{MOE}activation.py",
        "MoEActivation",
        "SILU='silu' SWIGLUOAI='swigluoai' SWIGLUOAI_UNINTERLEAVE='swigluoai_uninterleave'",
    ),
    InterfaceUse(What.FIELDS, f"{MOE}config.py", "FusedMoEConfig"),
    InterfaceUse(What.FIELDS, f"{MOE}config.py", "FusedMoEParallelConfig"),
    names_in(f"{MOE}config.py", "FusedMoEParallelConfig", "use_all2all_kernels use_batched_activation_format"),
    names_in(f"{MOE}config.py", "FusedMoEQuantConfig", "gemm1_alpha gemm1_beta gemm1_clamp_limit"),
    names_in(f"{MOE}modular_kernel.py", "FusedMoEActivationFormat", "Standard"),
    names_in(f"{MOE}modular_kernel.py", "FusedMoEKernel", "fused_experts"),
    InterfaceUse(What.MEMBERS, f"{MOE}modular_kernel.py", "FusedMoEExperts"),
    InterfaceUse(What.PARAMETERS, f"{MOE}modular_kernel.py", "FusedMoEExperts.__init__"),
    InterfaceUse(What.PARAMETERS, f"{MOE}modular_kernel.py", "FusedMoEExperts.is_supported_config"),
    InterfaceUse(What.MEMBERS, f"{MOE}modular_kernel.py", "FusedMoEExpertsModular"),
    InterfaceUse(What.PARAMETERS, f"{MOE}modular_kernel.py", "FusedMoEExpertsModular.apply"),
    InterfaceUse(What.PARAMETERS, f"{MOE}modular_kernel.py", "FusedMoEExpertsModular.workspace_shapes"),
    names_in(f"{MOE}topk_weight_and_reduce.py", "", "TopKWeightAndReduceNoOP"),
    names_in(f"{MOE}oracle/fp8.py", "Fp8MoeBackend", "TRITON_MXFP8"),
    names_in(f"{MOE}oracle/unquantized.py", "UnquantizedMoeBackend", "TRITON"),
    names_in(f"{MOE}fused_moe_method_base.py", "FusedMoEMethodBase", "moe_kernel"),
    names_in(
        f"{MOE}unquantized_fused_moe_method.py",
        "UnquantizedFusedMoEMethod",
        "experts_cls process_weights_after_loading unquantized_backend",
    ),
    names_in(f"{QUANT}utils/quant_utils.py", "", "kMxfp8Dynamic kMxfp8Static"),
    names_in(f"{QUANT}modelopt.py", "ModelOptMxFp8FusedMoE", "experts_cls mxfp8_backend process_weights_after_loading"),
    names_in(
        f"{QUANT}compressed_tensors/compressed_tensors_moe/compressed_tensors_moe_w8a8_mxfp8.py",
        "CompressedTensorsW8A8Mxfp8MoEMethod",
        "experts_cls fp8_backend process_weights_after_loading",
    ),
    names_in(
        f"{QUANT}online/mxfp8.py", "Mxfp8OnlineMoEMethod", "experts_cls fp8_backend process_weights_after_loading"
    ),
)

VLLM = ServerProject("vLLM", Path(__file__).with_name("interfaces.json"), USES)
"""Its record is written by ``tools/vllm_releases.py``."""
