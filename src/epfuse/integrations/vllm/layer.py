"""Whether epfuse takes one of vLLM's layers over, and the line about it in the log."""

from __future__ import annotations

import logging
from typing import Any

from epfuse.integrations.choice import Choice, choose
from epfuse.integrations.vllm import versions
from epfuse.integrations.vllm.experts import EpfuseExperts, own_refusal
from epfuse.integrations.vllm.takeover import take_over

log: logging.Logger = logging.getLogger("vllm.epfuse")

_said: set[str] = set()


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


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.info("%s", text)
