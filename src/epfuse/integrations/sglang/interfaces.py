"""All that epfuse uses of SGLang."""

from __future__ import annotations

from pathlib import Path

from epfuse.integrations.interfaces import InterfaceUse, ServerProject, What, names_in

LAYERS = "srt/layers/"
MOE = f"{LAYERS}moe/"
QUANT = f"{LAYERS}quantization/"

USES = (
    names_in("srt/plugins/hook_registry.py", "HookType", "BEFORE='before' AROUND='around'"),
    InterfaceUse(What.PARAMETERS, "srt/plugins/hook_registry.py", "HookRegistry.register"),
    names_in("srt/arg_groups/choices.py", "", "MOE_RUNNER_BACKEND_CHOICES MXFP8_MOE_RUNNER_BACKEND_CHOICES"),
    names_in("srt/runtime_context.py", "", "get_server_args"),
    InterfaceUse(What.PARAMETERS, "srt/arg_groups/overrides.py", "resolution_result"),
    InterfaceUse(What.FIELDS, f"{MOE}moe_runner/base.py", "MoeRunnerConfig"),
    names_in(f"{MOE}moe_runner/base.py", "", "MoeQuantInfo"),
    InterfaceUse(What.MEMBERS, f"{MOE}moe_runner/base.py", "DispatchMoeRunnerCore"),
    InterfaceUse(What.PARAMETERS, f"{MOE}moe_runner/base.py", "DispatchMoeRunnerCore.run_from_dispatch"),
    InterfaceUse(What.PARAMETERS, f"{MOE}moe_runner/runner.py", "register_moe_runner_core"),
    InterfaceUse(What.PARAMETERS, f"{MOE}moe_runner/runner.py", "MoeRunner.__init__"),
    InterfaceUse(What.PARAMETERS, f"{MOE}moe_runner/runner.py", "MoeRunner.run"),
    InterfaceUse(What.FIELDS, f"{MOE}token_dispatcher/standard.py", "StandardDispatchOutput"),
    InterfaceUse(What.FIELDS, f"{MOE}token_dispatcher/standard.py", "StandardCombineInput"),
    names_in(f"{MOE}token_dispatcher/standard.py", "StandardDispatcher", "skip_local_expert_mapping dispatch combine"),
    names_in(f"{MOE}topk.py", "TopKOutputChecker", "format_is_standard"),
    names_in(f"{MOE}utils.py", "", "get_moe_a2a_backend get_moe_runner_backend resolve_moe_runner_backend"),
    InterfaceUse(What.PARAMETERS, f"{MOE}fused_moe_triton/layer.py", "FusedMoE.__init__"),
    InterfaceUse(What.PARAMETERS, f"{MOE}fused_moe_triton/layer.py", "FusedMoE.weight_loader"),
    names_in(
        f"{MOE}fused_moe_triton/layer.py",
        "FusedMoE",
        "_map_global_expert_id_to_local_expert_id dispatcher layer_name moe_ep_size moe_runner_config moe_tp_size"
        " num_local_experts params_dtype quant_method with_bias",
    ),
    InterfaceUse(What.MEMBERS, f"{QUANT}base_config.py", "FusedMoEMethodBase"),
    names_in(f"{QUANT}base_config.py", "QuantizeMethodBase", "restore_weights_before_loading"),
    names_in(f"{QUANT}fp8.py", "Fp8Config", "is_checkpoint_fp8_serialized is_fp4_experts use_mxfp8"),
    InterfaceUse(What.PARAMETERS, f"{QUANT}fp8.py", "Fp8Config.get_min_capability"),
    InterfaceUse(What.PARAMETERS, f"{QUANT}fp8.py", "Fp8Config.get_quant_method"),
    InterfaceUse(What.PARAMETERS, f"{QUANT}fp8.py", "Fp8MoEMethod.create_weights"),
    InterfaceUse(What.PARAMETERS, f"{QUANT}fp8.py", "Fp8LinearMethod.create_weights"),
    InterfaceUse(What.PARAMETERS, f"{QUANT}unquant.py", "UnquantizedFusedMoEMethod.create_weights"),
    InterfaceUse(What.PARAMETERS, f"{QUANT}unquant.py", "UnquantizedLinearMethod.apply"),
    InterfaceUse(
        What.PARAMETERS,
        "srt/model_executor/model_runner_components/weight_updater.py",
        "_model_load_weights_direct",
    ),
)

SGLANG = ServerProject("SGLang", Path(__file__).with_name("interfaces.json"), USES)
"""Its record is written by ``tools/sglang_releases.py``."""
