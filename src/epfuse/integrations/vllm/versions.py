"""Everything that differs between vLLM releases, and every vLLM name that is not a stable interface."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from epfuse.arguments import checks_enums
from epfuse.config import LayerShape, SwiGLUOAI
from epfuse.errors import ConfigError, UnsupportedTarget
from epfuse.policy import LayerFacts
from epfuse.target import Target, device_name, target_of
from epfuse.weights.checkpoint_format import Checkpoint


@checks_enums
@dataclass(frozen=True)
class QuantMethod:
    """One of vLLM's quantisation methods whose experts can be replaced.

    Attributes:
        checkpoint: the numbers of its weights.
        backend_attribute: where it keeps the backend that it chose.
        backend: the enum member whose load-time conversion leaves the weights as the checkpoint has them.
        replaces: names of the experts classes that we stand in for; None for all.
        keeps_biases: whether it makes parameters of the biases of experts that have some.
    """

    checkpoint: Checkpoint
    backend_attribute: str
    backend: Callable[[], Any]
    replaces: frozenset[str] | None = None
    keeps_biases: bool = False


def _plain_mxfp8() -> Any:
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend

    return Fp8MoeBackend.TRITON_MXFP8  # its weights are neither shuffled nor, as EMULATION's, made BF16


def _plain_dense() -> Any:
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    return UnquantizedMoeBackend.TRITON


METHODS = {
    "ModelOptMxFp8FusedMoE": QuantMethod(Checkpoint.MXFP8, "mxfp8_backend", _plain_mxfp8),
    "CompressedTensorsW8A8Mxfp8MoEMethod": QuantMethod(Checkpoint.MXFP8, "fp8_backend", _plain_mxfp8),
    "Mxfp8OnlineMoEMethod": QuantMethod(Checkpoint.MXFP8, "fp8_backend", _plain_mxfp8, keeps_biases=True),
    "UnquantizedFusedMoEMethod": QuantMethod(
        Checkpoint.BF16, "unquantized_backend", _plain_dense, frozenset({"TritonExperts"}), keeps_biases=True
    ),
}
"""vLLM's class name -> what we know of it; the same in all tested releases."""


_MXFP4 = "epfuse would keep MXFP4 as MXFP8, twice the bytes, and no measurement says that it would be faster."
LEFT = {"GptOssMxfp4MoEMethod": _MXFP4, "Mxfp4MoEMethod": _MXFP4}
"""Class name of a method whose weights epfuse could read -> why it doesn't take them from vLLM."""


def why_left(method: str, has_bias: bool) -> str | None:
    """Why epfuse takes no layer of a quantisation method whose weights it could read; None if it may.

    Args:
        method: its class's name.
        has_bias: whether the experts have biases.
    """
    known = METHODS.get(method)
    if known is not None and has_bias and not known.keeps_biases:
        return "it makes no parameters for biases, and these experts have some."
    return LEFT.get(method)


def method_of(quant_method: Any) -> QuantMethod | None:
    """What we know of a quantisation method that has chosen its experts; None leaves it alone."""
    found = METHODS.get(type(quant_method).__name__)
    own = own_experts(quant_method)
    if found is None or own == "none" or (found.replaces is not None and own not in found.replaces):
        return None
    return found


def own_experts(quant_method: Any) -> str:
    """Name of the experts class that vLLM chose."""
    chosen = getattr(quant_method, "experts_cls", None)
    return "none" if chosen is None else str(chosen.__name__)


def facts_of(layer: Any, quant_method: Any, moe_config: Any, name: str) -> LayerFacts:
    """What vLLM is about to build.

    Args:
        layer: its RoutedExperts, before the weights are made.
        quant_method: as vLLM chose it.
        moe_config: its FusedMoEConfig.
        name: the layer's name.
    """
    method, parallel = method_of(quant_method), moe_config.moe_parallel_config
    index = re.search(r"\.layers\.(\d+)\.", f".{name}.")
    model = _model_config()
    activation = VllmActivation.of_layer(layer, moe_config)
    return LayerFacts(
        name=name,
        layer=int(index.group(1)) if index else 0,
        method=type(quant_method).__name__,
        own_experts=own_experts(quant_method),
        checkpoint=None if method is None else method.checkpoint,
        target=_target(moe_config.device),
        device_name=_product(moe_config.device),
        max_tokens=_max_tokens(parallel),
        shape=None
        if moe_config.num_local_experts == 0
        else LayerShape(
            hidden=moe_config.hidden_dim,
            intermediate=moe_config.intermediate_size_per_partition,
            experts=moe_config.num_experts,
            local_experts=moe_config.num_local_experts,
            top_k=moe_config.experts_per_token,
        ),
        tp_size=parallel.tp_size,
        ep_size=parallel.ep_size,
        max_model_len=1 if model is None else model.max_model_len,
        shared_experts=0 if model is None else int(getattr(model.hf_text_config, "n_shared_experts", 0) or 0),
        activation=activation.computed,
        activation_name=str(activation),
        dtype=str(moe_config.in_dtype),
        weights_dtype=str(layer.params_dtype),
        asked_backend=moe_config.moe_backend,
        has_lora=moe_config.is_lora_enabled,
        has_eplb=parallel.enable_eplb,
        has_bias=moe_config.has_bias,
        has_alternating_rows=moe_config.activation.value == INTERLEAVED,
        has_fused_shared_experts=layer.expert_map_manager.num_fused_shared_experts > 0,
        has_masked_expert_map=moe_config.rocm_aiter_fmoe_enabled and not _has_per_kernel_map(),
        weights_input=layer.apply_router_weight_on_input,
        needs_batch_invariance=_needs_batch_invariance(),
        why_left=why_left(type(quant_method).__name__, moe_config.has_bias),
        all2all=exchange_of(parallel),
        is_batched=parallel.use_batched_activation_format,
    )


INTERLEAVED = "swigluoai"
"""vLLM's word for the activation whose gate and up rows alternate in w13 and in its bias."""
GPT_OSS = SwiGLUOAI(alpha=1.702, beta=1.0, limit=7.0)
"""What vLLM's kernel of it computes."""


@dataclass(frozen=True)
class VllmActivation:
    """An activation in vLLM's words, from one place or from several that may contradict each other.

    Attributes:
        name: the value of its MoEActivation.
        alpha: the sigmoid's gain, by each place that gives one.
        beta: what is added to up.
        limit: what gate and up are clamped to.
    """

    name: str
    alpha: frozenset[float]
    beta: frozenset[float]
    limit: frozenset[float]

    @classmethod
    def of_layer(cls, layer: Any, moe_config: Any) -> VllmActivation:
        """As the model's code gave it to a RoutedExperts and to its FusedMoEConfig."""
        return cls(
            moe_config.activation.value,
            _given(layer.swiglu_alpha, moe_config.swiglu_alpha),
            _given(layer.swiglu_beta, moe_config.swiglu_beta),
            _given(layer.swiglu_limit, moe_config.swiglu_limit),
        )

    @classmethod
    def of_experts(cls, experts: Any, name: str) -> VllmActivation:
        """As an experts object was made with: from its quantisation's parameters and its FusedMoEConfig."""
        quant, moe = experts.quant_config, experts.moe_config
        return cls(
            name,
            _given(quant.gemm1_alpha, moe.swiglu_alpha),
            _given(quant.gemm1_beta, moe.swiglu_beta),
            _given(quant.gemm1_clamp_limit, moe.swiglu_limit),
        )

    @property
    def computed(self) -> SwiGLUOAI | None:
        """In our words; None for one that we don't compute, or of which a part is missing or given twice.

        vLLM's own experts don't agree on the gain of ``swigluoai_uninterleave`` where none is given (in 0.25.1 1.702
        or 1), nor on what a gain means for ``silu``: such a layer is left to vLLM. ``swigluoai``, gpt-oss's, is one
        function: vLLM's kernel of it takes no parameters.
        """
        if max(map(len, (self.alpha, self.beta, self.limit))) > 1:
            return None
        alpha, beta, limit = (next(iter(part), None) for part in (self.alpha, self.beta, self.limit))
        if self.name == INTERLEAVED:
            given = (alpha, beta, limit)
            same = all(value in (None, fixed) for value, fixed in zip(given, GPT_OSS.parameters, strict=True))
            return GPT_OSS if same else None
        if self.name == "silu":
            if alpha not in (None, 1.0) or beta not in (None, 0.0):
                return None
            alpha, beta, limit = 1.0, 0.0, math.inf if limit is None else limit
        if not supports_activation(self.name) or alpha is None or beta is None or limit is None:
            return None
        try:
            return SwiGLUOAI(alpha, beta, limit)
        except ConfigError:  # vLLM checks none of them
            return None

    def __str__(self) -> str:
        parts = [("alpha", self.alpha), ("beta", self.beta), ("limit", self.limit)]
        said = [f"{part} {' and '.join(f'{value:g}' for value in sorted(values))}" for part, values in parts if values]
        return f"{self.name} with {', '.join(said)}" if said else self.name


def supports_activation(name: str) -> bool:
    """Whether we compute an activation of this name, given the parameters that it needs."""
    return name in ("silu", "swigluoai_uninterleave", INTERLEAVED)


def _given(*values: float | None) -> frozenset[float]:
    return frozenset(float(value) for value in values if value is not None)


def _has_per_kernel_map() -> bool:
    """Whether an experts class says which map it wants (0.33); in 0.25 an environment variable decides for all."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts

    return hasattr(FusedMoEExperts, "consumes_expert_mask")


def _target(device: Any) -> Target | None:
    try:
        return target_of(torch.device(device))
    except UnsupportedTarget:
        return None


def _product(device: Any) -> str | None:
    """The GPU, as tables know it; None where there is none to ask."""
    found = torch.device(device)
    return device_name(found) if found.type == "cuda" else None


def _model_config() -> Any:
    """The ModelConfig while a model is built; None outside."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    return None if config is None else config.model_config


def exchange_of(parallel: Any) -> str | None:
    """How a layer's tokens are exchanged between ranks, in vLLM's words; None where they stay.

    Args:
        parallel: vLLM's FusedMoEParallelConfig.
    """
    name: str = parallel.all2all_backend
    if name == "passthrough":  # of 0.32: experts exchange them themselves, however few ranks there are
        return name
    if not parallel.use_all2all_kernels:
        return None
    return name if parallel.pcp_size == 1 else f"{name} between ranks of prefill context parallelism"


def _max_tokens(parallel: Any) -> int | None:
    """The most tokens of a call while serving; None outside of a model's construction.

    Data parallel ranks gather what each of them has; where tensor parallel ranks cut that into parts, in equal ones.
    """
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    scheduler = getattr(config, "scheduler_config", None)
    found = None if scheduler is None else scheduler.max_num_batched_tokens
    if found is None:
        return None
    parts = max(1, int(parallel.sp_size))
    return int(parallel.dp_size) * -(-int(found) // parts) * parts


def _needs_batch_invariance() -> bool:
    import vllm.envs as envs

    return bool(envs.VLLM_BATCH_INVARIANT)
