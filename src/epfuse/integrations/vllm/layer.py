"""The replacement of vLLM's RoutedExperts; loaded by the plugin, in a process that has vLLM."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from epfuse.errors import ConfigError
from epfuse.integrations.choice import Choice, choose
from epfuse.integrations.switches import STRICT, is_on
from epfuse.integrations.vllm import versions
from epfuse.integrations.vllm.experts import EpfuseExperts, own_refusal
from epfuse.integrations.vllm.takeover import take_over

log: logging.Logger = logging.getLogger("vllm.epfuse")

_said: set[str] = set()


class _Offered:
    """What a stand-in for one of vLLM's RoutedExperts has of its own: its method may build epfuse's experts instead."""

    if TYPE_CHECKING:
        layer_name: str
        quant_method: Any
        _map_global_expert_id_to_local_expert_id: Callable[[int], int]

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        method = cast("Any", super())._get_quant_method(prefix, quant_config, moe_config)
        try:
            offer(self, method, moe_config, prefix)
        except Exception:
            if is_on(STRICT):
                raise
            log.exception("epfuse leaves %s to vLLM: asking failed", prefix)
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
        is_final = isinstance(experts, EpfuseExperts) and experts.has_rearranged_weights
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


def offer(layer: Any, method: Any, moe_config: Any, name: str) -> Choice:
    """Ask for one layer, and take it over if the answer is yes; each different answer is logged once.

    Args:
        layer: vLLM's RoutedExperts, before its weights are made.
        method: the quantisation method that it chose.
        moe_config: its FusedMoEConfig.
        name: the layer's name.
    """
    choice = choose(versions.facts_of(layer, method, moe_config, name))
    if choice.plan is not None:
        refused = own_refusal(moe_config, choice.plan.request.checkpoint)
        choice = choice if refused is None else Choice(choice.facts, None, refused)
    if choice.plan is None:
        _say_once(f"epfuse leaves experts to vLLM's {choice.facts.own_experts}: {choice.reason}")
        return choice
    known = versions.method_of(method)
    assert known is not None
    replaced = choice.facts.own_experts
    take_over(method, known.backend_attribute, known.backend(), EpfuseExperts, choice)
    policy, storage = choice.plan.policy.value, choice.plan.storage.value
    _say_once(f"epfuse runs experts in place of vLLM's {replaced}; policy {policy}, weights {storage}: {choice.reason}")
    return choice


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


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.info("%s", text)
