"""What of SGLang's calls goes through epfuse, by SGLang's own registry of hooks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES, MXFP8_MOE_RUNNER_BACKEND_CHOICES
from sglang.srt.layers.moe.moe_runner.runner import register_moe_runner_core
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from epfuse.errors import ConfigError
from epfuse.integrations.choice import Choice
from epfuse.integrations.sglang.dense import DenseMxfp8Method
from epfuse.integrations.sglang.experts import EpfuseMoEMethod, EpfuseRunnerCore
from epfuse.integrations.sglang.facts import offer_of, runner_here, target_here
from epfuse.integrations.sglang.rules import NAME, decide, makes_linears_bf16, why_it_stops
from epfuse.integrations.sglang.settings import setting
from epfuse.integrations.switches import STRICT, is_on
from epfuse.target import Target

log: logging.Logger = logging.getLogger("sglang.srt.epfuse")  # below SGLang's own logger, whose handlers print it

HOPPER = 90
"""SGLang's number for sm_90."""

_said: set[str] = set()


def install() -> None:
    """Register the runner and the hooks; SGLang applies these once every plugin has been asked."""
    register_moe_runner_core(NAME, EpfuseRunnerCore)
    for choices in (MOE_RUNNER_BACKEND_CHOICES, MXFP8_MOE_RUNNER_BACKEND_CHOICES):
        choices.append(NAME)
    quantization = "sglang.srt.layers.quantization"
    updater = "sglang.srt.model_executor.model_runner_components.weight_updater"
    for target, hook, kind in (
        (f"{quantization}.fp8.Fp8Config.get_min_capability", lift_gate, HookType.AROUND),
        (f"{quantization}.fp8.Fp8Config.get_quant_method", replace_dense, HookType.AROUND),
        (f"{quantization}.fp8.Fp8MoEMethod.create_weights", take_over_experts, HookType.AROUND),
        (f"{quantization}.unquant.UnquantizedFusedMoEMethod.create_weights", take_over_experts, HookType.AROUND),
        (f"{updater}._model_load_weights_direct", check_direct_load, HookType.BEFORE),
    ):
        HookRegistry.register(target, hook, kind)


def take_over_experts(original: Callable[..., Any], method: Any, layer: Any, *arguments: Any, **named: Any) -> None:
    """Let SGLang's method make a layer's weights, and put ours in its place where the policy says so.

    Raises:
        ConfigError: epfuse can't run the layer, and the user asked for it or SGLang has nothing else that runs it.
    """
    choice = _choice(layer, method)
    if choice is None or choice.plan is None:
        original(method, layer, *arguments, **named)
        return
    ours = EpfuseMoEMethod(method, choice.plan, choice.facts.max_tokens)
    loader = named["weight_loader"]

    def load(param: Any, *rest: Any, **more: Any) -> Any:
        ours.require_loadable(layer)
        return loader(param, *rest, **more)

    original(method, layer, *arguments, **{**named, "weight_loader": load})
    del layer.quant_method  # some of SGLang's methods are modules, whose place nothing else may take
    layer.quant_method = ours


def _choice(layer: Any, method: Any) -> Choice | None:
    """Who runs a layer; None where it is none of our business."""
    if type(method).__name__ not in ("Fp8MoEMethod", "UnquantizedFusedMoEMethod"):
        return None
    try:
        offer = offer_of(layer, method)
        choice = decide(offer)
    except Exception as error:
        if is_on(STRICT) or runner_here().is_ours:
            raise
        if repr(error) not in _said:  # sixty layers fail alike
            _said.add(repr(error))
            log.exception("epfuse leaves %s to SGLang, and so each layer like it: asking failed", layer.layer_name)
        return None
    stops = why_it_stops(offer, choice)
    if stops is not None:
        raise ConfigError(stops)
    if choice.plan is None:
        _say_once(f"epfuse leaves experts to SGLang's {type(method).__name__}: {choice.reason}")
    else:
        policy, storage = choice.plan.policy.value, choice.plan.storage.value
        _say_once(f"epfuse runs experts; policy {policy}, weights {storage}: {choice.reason}")
    return choice


def lift_gate(original: Callable[..., int], config: Any) -> int:
    """MXFP8 may start on Hopper: each of its layers has a path then, or is refused by name when it is built."""
    least = original(config)
    return min(least, HOPPER) if config.use_mxfp8 and target_here_or_gpu() is Target.SM90 else least


def target_here_or_gpu() -> Target | None:
    """The target of the GPU, asked where SGLang has not set it as the default device yet."""
    if torch.cuda.is_available():
        with torch.device("cuda"):
            return target_here()
    return target_here()


def replace_dense(original: Callable[..., Any], config: Any, layer: Any, prefix: str) -> Any:
    """MXFP8 linears become BF16 at load on Hopper, unless the user named a kernel for them."""
    method = original(config, layer, prefix)
    is_mxfp8 = type(method).__name__ == "Fp8LinearMethod" and config.use_mxfp8 and config.is_checkpoint_fp8_serialized
    if not makes_linears_bf16(is_mxfp8, target_here(), setting("fp8_gemm_runner_backend")):
        return method
    _say_once("epfuse loads MXFP8 linear layers as BF16: SGLang has no kernel for them here; they take twice the bytes")
    return DenseMxfp8Method(method, prefix)


def check_direct_load(model: Any, named_tensors: Any) -> None:
    """Refuse a load that goes past the weights' own loaders into weights that are in epfuse's order.

    Raises:
        ConfigError: one of them is; nothing has been written.
    """
    modules = dict(model.named_modules())
    for name, _ in named_tensors:
        module = modules.get(name.rpartition(".")[0])
        method = getattr(module, "quant_method", None)
        if isinstance(method, EpfuseMoEMethod | DenseMxfp8Method):
            method.require_loadable(module)


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.info("%s", text)
