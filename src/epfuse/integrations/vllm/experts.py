"""vLLM's modular experts interface on `fused_experts`."""

from __future__ import annotations

import logging
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp8Dynamic, kMxfp8Static
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from epfuse.api import fused_experts
from epfuse.config import Bias, Path
from epfuse.errors import ConfigError
from epfuse.families.registry import scratch_size
from epfuse.integrations.load import LoadedLayer, Parameters, load_layer
from epfuse.integrations.vllm import versions
from epfuse.integrations.warm import warm
from epfuse.policy import Checkpoint, LayerPlan, Storage
from epfuse.policy.facts import GATHERED
from epfuse.scratch import Scratch
from epfuse.weights.layouts import OURS, GateUpRows, WeightLayout

log: logging.Logger = logging.getLogger("vllm.epfuse")

_READ = frozenset({"w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale"})
"""What `load` takes of a layer."""
_BIASES = ("w13_bias", "w2_bias")
"""And of one whose experts have biases."""
_UNREAD = ("w1_bias", "w2_bias", "w1_zp", "w2_zp", "a1_scale", "a2_scale", "a1_gscale", "a2_gscale", "g1_alphas")
"""What an experts object of vLLM's can be given besides."""


class EpfuseExperts(mk.FusedMoEExpertsModular):
    """The local experts of one layer: weighted, summed over a token's local routes, one row a token.

    vLLM makes one for every layer; `load` gives it the weights before the first call.
    """

    _loaded: LoadedLayer | None = None
    _weight_addresses: tuple[int, int] | None = None
    _activation_name: str | None = None
    _has_copies: bool = False

    @staticmethod
    def activation_format() -> Any:
        return mk.FusedMoEActivationFormat.Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True  # what the activations become is the path's business

    @staticmethod
    def _supports_current_device() -> bool:
        # which GPU it is, `refusals.py` asks
        return bool(current_platform.is_cuda_alike() or current_platform.is_cpu())

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return (weight_key, activation_key) in ((None, None), (kMxfp8Static, kMxfp8Dynamic))

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return versions.supports_activation(activation.value)

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return versions.exchange_of(moe_parallel_config) in (None, GATHERED) and not moe_parallel_config.enable_eplb

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceNoOP()  # apply() has weighted and summed

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Enough for every path that the layer's plan has, so that the sizes only grow with ``M``.

        ``workspace13``, which ``output`` may be a part of, is `Scratch.y`; ``workspace2`` is `Scratch.routed`.
        """
        paths = (Path.AUTO,) if self._loaded is None else self._loaded.paths
        sizes = [scratch_size(path, 1, topk, K, N // 2) for path in paths]
        return (M, max(size.y for size in sizes)), (M, max(size.routed for size in sizes)), (M, K)

    def load(self, layer: Any, plan: LayerPlan, max_tokens: int | None = None) -> None:
        """Take over a layer's weights, in their own memory where the plan keeps MXFP8; have its kernels ready.

        Called again for the same tensors, which vLLM may do, it changes nothing. What is copied (biases, and a dense
        w13 whose gate and up rows alternate) leaves a parameter that nothing can be loaded into.

        Args:
            layer: vLLM's RoutedExperts after loading.
            plan: how epfuse runs it.
            max_tokens: the most tokens of a call; None where vLLM has not said.

        Raises:
            ConfigError: other weights have been loaded since, the activation is not the plan's, or the layer has what
                epfuse does not compute with.
        """
        if self._loaded is not None:
            if self._weight_addresses != _addresses(layer):
                raise ConfigError(f"the weights of {layer.layer_name} were replaced; epfuse can't reload them in place")
            return
        activation = versions.VllmActivation.of_experts(self, layer.activation.value).computed
        if activation != plan.request.activation or activation is None:
            raise ConfigError(f"{layer.layer_name} has activation {activation}; its plan has {plan.request.activation}")
        own = {name: tensor for name, tensor in layer.named_parameters(recurse=False) if name[:2] in ("w1", "w2", "w3")}
        biases = () if plan.request.bias is Bias.NONE else _BIASES
        unread = [name for name in _UNREAD if getattr(self, name, None) is not None]
        unread = [name for name in unread if not (biases and name in ("w1_bias", "w2_bias"))]  # w13's and w2's
        unread += [name for name in own if name not in _READ and name not in biases]
        if unread:
            raise ConfigError(f"{layer.layer_name} has {', '.join(unread)}, which epfuse does not compute with")
        missing = [name for name in biases if name not in own]
        if missing:
            raise ConfigError(f"{layer.layer_name} has no {', '.join(missing)}; its plan is for experts with biases")
        alternates = layer.activation.value == versions.INTERLEAVED
        scales = {name: getattr(layer, f"{name}_weight_scale", None) for name in ("w13", "w2")}
        given = Parameters(
            w13=layer.w13_weight.data,
            w2=layer.w2_weight.data,
            w13_scale=None if scales["w13"] is None else scales["w13"].data,
            w2_scale=None if scales["w2"] is None else scales["w2"].data,
            expert_map=layer.expert_map,
            w13_bias=own["w13_bias"].data if biases else None,
            w2_bias=own["w2_bias"].data if biases else None,
            layout=WeightLayout(GateUpRows.ALTERNATING) if alternates else OURS,
        )
        self._loaded = load_layer(plan, given, activation)
        is_dense = plan.request.checkpoint is Checkpoint.BF16
        copied = (("w13_weight",) if alternates and is_dense else ()) + biases
        self._has_copies = bool(copied)
        dense, kept = self._loaded.weights.dense_experts, {}
        if plan.storage is Storage.BF16 and dense is not None:
            kept = {"w13_weight": dense.w13, "w2_weight": dense.w2}
        for name in copied:
            kept[name] = own[name].new_empty(()).expand(own[name].shape)  # a load into it raises
        for name, tensor in kept.items():
            if tensor.data_ptr() != own[name].data_ptr():
                replace_parameter(layer, name, tensor)  # frees what was loaded
        self._weight_addresses = _addresses(layer)
        self._activation_name = layer.activation.value
        warm(self._loaded, max_tokens, log)

    def holds_copies_of(self, layer: Any) -> bool:
        """Whether some of the layer's parameters have no memory of their own, because these experts hold copies."""
        return self._has_copies and self._weight_addresses == _addresses(layer)

    @property
    def has_rearranged_weights(self) -> bool:
        """Whether the layer's parameters no longer hold what a checkpoint has, so that none can be loaded into them."""
        is_mxfp8 = self._loaded is not None and self._loaded.plan.request.checkpoint is not Checkpoint.BF16
        return is_mxfp8 or self._has_copies

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write ``[T, H]``: the weighted sum of every token's local routes, zero where it has none.

        ``output`` may be a part of ``workspace13``: the rows that lie there are dead when it is written.

        Raises:
            ConfigError: the weights were never loaded, or vLLM calls for what was refused when the layer was built.
            EpfuseError: what `fused_experts` refuses.

        Host syncs: none; graph-capturable.
        """
        loaded = self._loaded
        if loaded is None:
            raise ConfigError("vLLM calls experts whose weights it has not loaded")
        if apply_router_weight_on_input or a1q_scale is not None or a2_scale is not None:
            raise ConfigError("epfuse weights the experts' outputs and takes activations that are not quantised")
        if getattr(self, "post_gemm2_hook", None) is not None:
            raise ConfigError("vLLM wants the rows of the second GEMM unweighted (post_gemm2_hook); epfuse sums them")
        if activation.value != self._activation_name:
            raise ConfigError(f"vLLM calls with activation {activation.value}; it loaded {self._activation_name}")
        if self._weight_addresses != (w1.data_ptr(), w2.data_ptr()):
            raise ConfigError("vLLM calls with other weights than it loaded; epfuse supports no reload and no offload")
        loaded.check_map(expert_map)
        fused_experts(
            hidden_states,
            loaded.weights,
            topk_weights.float().contiguous(),
            topk_ids.contiguous(),
            loaded.expert_map,
            activation=loaded.activation,
            path=loaded.path(hidden_states.shape[0]),
            out=output,
            scratch=Scratch(workspace13, workspace2),
        )


def _addresses(layer: Any) -> tuple[int, int]:
    """Where both matrices of a layer begin, as vLLM hands them to calls."""
    return layer.w13_weight.data_ptr(), layer.w2_weight.data_ptr()


def own_refusal(moe_config: Any, checkpoint: Checkpoint) -> str | None:
    """What vLLM's own support check says against our class; None where it says nothing.

    Args:
        moe_config: vLLM's FusedMoEConfig.
        checkpoint: the numbers of the weights.
    """
    keys = (kMxfp8Static, kMxfp8Dynamic) if checkpoint is Checkpoint.MXFP8 else (None, None)
    form = EpfuseExperts.activation_format()
    supported, reason = EpfuseExperts.is_supported_config(EpfuseExperts, moe_config, *keys, form)
    return None if supported else f"vLLM's support check says: {reason}."
