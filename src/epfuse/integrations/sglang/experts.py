"""The quantisation method of a layer whose experts epfuse runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore, MoeQuantInfo, MoeRunnerConfig
from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.layers.moe.utils import resolve_moe_runner_backend
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase

from epfuse.api import fused_experts
from epfuse.errors import ConfigError
from epfuse.integrations.load import LoadedLayer, Parameters, load_layer
from epfuse.integrations.loading import LoadingLog
from epfuse.integrations.sglang.rules import NAME
from epfuse.integrations.warm import warm
from epfuse.policy import Checkpoint, LayerPlan, Storage
from epfuse.weights.restore import restore_checkpoint_order, take_over_memory

log: logging.Logger = logging.getLogger("sglang.srt.epfuse")  # below SGLang's own logger, whose handlers print it
loading: LoadingLog = LoadingLog(log)

SCALES = ("w13_weight_scale_inv", "w2_weight_scale_inv")


@dataclass
class EpfuseQuantInfo(MoeQuantInfo):
    """What the runner needs of a layer besides SGLang's own arguments."""

    loaded: LoadedLayer


class EpfuseRunnerCore(DispatchMoeRunnerCore):
    """Runs the standard dispatcher's local routes: weighted, summed over a token's routes, one row a token."""

    @property
    def runner_backend(self) -> Any:
        return resolve_moe_runner_backend(NAME)

    def run_from_dispatch(
        self, dispatch_output: Any, quant_info: MoeQuantInfo, runner_config: MoeRunnerConfig, hooks: Any = None
    ) -> Any:
        """Compute ``[T, H]`` from hidden states ``[T, H]`` and the routes ``[T, K]`` of the dispatcher.

        Raises:
            ConfigError: SGLang calls for what was refused when the layer was built.
            EpfuseError: what `fused_experts` refuses.

        Host syncs: none; graph-capturable.
        """
        assert isinstance(quant_info, EpfuseQuantInfo)
        topk, loaded = dispatch_output.topk_output, quant_info.loaded
        if hooks is not None:
            raise ConfigError("SGLang calls with LoRA hooks, which epfuse does not serve")
        if dispatch_output.hidden_states_scale is not None:
            raise ConfigError("SGLang's dispatcher hands over quantised activations; epfuse takes BF16")
        if not TopKOutputChecker.format_is_standard(topk):
            raise ConfigError(f"SGLang hands over routes as {type(topk).__name__}; epfuse takes StandardTopKOutput")
        weights = topk.topk_weights.float()
        if runner_config.routed_scaling_factor is not None:
            weights = weights * runner_config.routed_scaling_factor
        hidden = dispatch_output.hidden_states
        result = fused_experts(
            hidden,
            loaded.weights,
            weights.contiguous(),
            topk.topk_ids.to(torch.int32).contiguous(),  # some routers give int64; kernels are compiled for one of both
            loaded.expert_map,
            activation=loaded.activation,
            path=loaded.path(hidden.shape[0]),
        )
        return StandardCombineInput(hidden_states=result)


class EpfuseMoEMethod(FusedMoEMethodBase):
    """Stands in for the method that SGLang chose, whose weights and loaders it keeps.

    New weights under way (``update_weights_from_disk``, ``begin_weight_update``) are loaded into the checkpoint's order
    and rearranged in the same memory, so that captured graphs stay valid. Loading over rearranged weights without that
    is refused before a byte is written.

    Args:
        own: SGLang's method, which has made the layer's weights.
        plan: how epfuse runs the layer.
        max_tokens: the most tokens of a call; None where SGLang has not said.
    """

    def __init__(self, own: Any, plan: LayerPlan, max_tokens: int | None = None) -> None:
        self._own, self._plan, self._max_tokens = own, plan, max_tokens
        self._loaded: LoadedLayer | None = None
        self._is_restored = True
        loading.expect(self)

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: MoeRunnerConfig) -> None:
        """SGLang's own runner, around `EpfuseRunnerCore`."""
        self.runner: Any = MoeRunner(resolve_moe_runner_backend(NAME), moe_runner_config)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Bring the weights into the plan's storage, the second time in the memory of the first; have kernels ready.

        Raises:
            ConfigError, ShapeError, DtypeError: the tensors are not what the plan was made for.
        """
        if not self._is_restored:
            return  # SGLang processes every layer again when one was loaded
        w13_scale, w2_scale = (getattr(layer, name, None) for name in SCALES)
        given = Parameters(
            w13=layer.w13_weight.data,
            w2=layer.w2_weight.data,
            w13_scale=None if w13_scale is None else w13_scale.data,
            w2_scale=None if w2_scale is None else w2_scale.data,
            expert_map=_ids_of(layer),
        )
        with loading.of(self):
            loaded = load_layer(self._plan, given, self._plan.request.activation)
            if self._loaded is not None:
                take_over_memory(self._loaded.weights, loaded.weights)
            else:
                self._loaded = loaded
        self._is_restored = not self._rearranges
        warm(self._loaded, self._max_tokens, log)

    def restore_weights_before_loading(self, layer: Any) -> None:
        """Give the parameters the checkpoint's order back, in their own memory."""
        if self._loaded is None or self._is_restored:
            return
        scales = [getattr(layer, name).data for name in SCALES]
        restore_checkpoint_order(self._loaded.weights, (layer.w13_weight.data, layer.w2_weight.data), scales)
        self._is_restored = True

    def require_loadable(self, layer: Any) -> None:
        """Refuse to load into weights that are in epfuse's own order.

        Raises:
            ConfigError: they are, and SGLang has not asked to restore them.
        """
        if not self._is_restored:
            raise ConfigError(
                f"weights of {layer.layer_name} would be loaded over weights that epfuse keeps in its own order; call"
                " begin_weight_update before and end_weight_update after, or update_weights_from_disk"
            )

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        """Run the layer.

        Raises:
            ConfigError: its weights were never loaded, or are being loaded.
        """
        if self._loaded is None or (self._rearranges and self._is_restored):
            raise ConfigError(f"SGLang calls {layer.layer_name} before its weights are loaded")
        assert self.runner is not None
        return self.runner.run(dispatch_output, EpfuseQuantInfo(self._loaded))

    @property
    def _rearranges(self) -> bool:
        return self._plan.request.checkpoint is not Checkpoint.BF16 and self._plan.storage is Storage.MXFP8


def _ids_of(layer: Any) -> torch.Tensor | None:
    """The map from the ids that the dispatcher hands over; None where they are all local.

    The standard dispatcher makes them local, with -1 for other ranks', unless the release keeps global ids. Local ids
    are still ids of one in E: how many rows an expert gets depends on E.
    """
    experts, local = layer.moe_runner_config.num_experts, layer.num_local_experts
    if layer.moe_ep_size == 1:
        return None
    keeps_global = layer.dispatcher.skip_local_expert_mapping or getattr(
        layer.dispatcher, "use_aiter_moe_runner", False
    )
    if keeps_global:
        held = [layer._map_global_expert_id_to_local_expert_id(expert) for expert in range(experts)]
    else:
        held = [expert if expert < local else -1 for expert in range(experts)]
    return torch.tensor(held, dtype=torch.int32, device=layer.w13_weight.device)
