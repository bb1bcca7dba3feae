"""The replacement of vLLM's RoutedExperts; loaded by the plugin, in a process that has vLLM.

vLLM's front end and the process in which it inspects a model load this, too, and never build a layer: what computes is
imported by the first layer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from epfuse.errors import ConfigError
from epfuse.integrations.switches import STRICT, is_on

log: logging.Logger = logging.getLogger("vllm.epfuse")

_failed: set[str] = set()
"""What has been said with a traceback; a model has sixty layers that fail alike."""


class _Offered:
    """What a stand-in for one of vLLM's RoutedExperts has of its own: its method may build epfuse's experts instead."""

    if TYPE_CHECKING:
        layer_name: str
        quant_method: Any
        _map_global_expert_id_to_local_expert_id: Callable[[int], int]

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        method = cast("Any", super())._get_quant_method(prefix, quant_config, moe_config)
        try:
            from epfuse.integrations.vllm import layer

            layer.offer(self, method, moe_config, prefix)
        except Exception as error:
            if is_on(STRICT):
                raise
            if repr(error) not in _failed:
                _failed.add(repr(error))
                log.exception("epfuse leaves %s to vLLM, and so each layer like it: asking failed", prefix)
        return method

    @functools.wraps(cast("Callable[..., Any]", RoutedExperts.weight_loader))
    def weight_loader(
        self, param: Any, loaded_weight: Any, weight_name: str, shard_id: str, expert_id: int, *rest: Any, **named: Any
    ) -> Any:
        """Load one weight as vLLM does, but not over weights that are in epfuse's own order by now.

        Raises:
            ConfigError: they are, and the expert is one of this rank's.
        """
        experts = getattr(getattr(self.quant_method, "moe_kernel", None), "fused_experts", None)
        is_final = getattr(experts, "has_rearranged_weights", False)  # of `EpfuseExperts` alone
        if is_final and self._map_global_expert_id_to_local_expert_id(expert_id) >= 0:
            raise ConfigError(
                f"{weight_name} of {self.layer_name} would be loaded over weights that epfuse keeps in its own order;"
                " it supports no reload of these weights: start the server again, or without epfuse"
            )
        return cast("Any", super()).weight_loader(
            param, loaded_weight, weight_name, shard_id, expert_id, *rest, **named
        )


class EpfuseRoutedExperts(_Offered, RoutedExperts):
    """vLLM's layer, with epfuse's experts where they are taken."""


OWN_LOADERS = frozenset({"GptOssRoutedExperts"})
"""Names of RoutedExperts that a model brings for the sake of how its checkpoint is loaded; the rest is as in vLLM's."""


def register_layer() -> bool:
    """Stand in for RoutedExperts in this process; False, with a warning, if another plugin does already."""
    taken = op_registry_oot.get(RoutedExperts.__name__)
    if taken is not None:
        log.warning("epfuse is not in use: %s replaces vLLM's RoutedExperts already", taken.__qualname__)
        return False
    RoutedExperts.register_oot(EpfuseRoutedExperts)
    for known in RoutedExperts.__subclasses__():
        _stand_in(known)
    # a model's module is imported when the model is built, long after this
    RoutedExperts.__init_subclass__ = classmethod(_stand_in)
    return True


def _stand_in(cls: Any, /, **_: Any) -> None:
    """Stand in for a model's own RoutedExperts too."""
    if cls.__name__ in OWN_LOADERS and cls.__name__ not in op_registry_oot:
        cls.register_oot(type(f"Epfuse{cls.__name__}", (_Offered, cls), {}))
