"""Point vLLM's quantisation method at our experts; everything else about it stays vLLM's."""

from __future__ import annotations

import logging
from typing import Any

from epfuse.integrations.choice import Choice
from epfuse.integrations.loading import LoadingLog

loading: LoadingLog = LoadingLog(logging.getLogger("vllm.epfuse"))


def take_over(method: Any, backend_attribute: str, backend: Any, experts_cls: Any, choice: Choice) -> None:
    """Make ``method`` build our experts and give them their weights after loading.

    Args:
        method: vLLM's quantisation method of one layer.
        backend_attribute: where it keeps the backend that it chose.
        backend: vLLM's enum member whose load-time conversion leaves the weights as the checkpoint has them.
        experts_cls: our experts.
        choice: with a plan.
    """
    own_processing = method.process_weights_after_loading

    def process_weights_after_loading(layer: Any) -> None:
        """Do what vLLM does, which builds the kernel object; then give the weights to our experts.

        A second time vLLM would copy each parameter onto itself, which one without memory of its own refuses.
        """
        experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
        if not (isinstance(experts, experts_cls) and experts.holds_copies_of(layer)):
            own_processing(layer)
        with loading.of(method):
            method.moe_kernel.fused_experts.load(layer, choice.plan, choice.facts.max_tokens)

    if choice.facts.has_bias or choice.facts.has_alternating_rows:
        # vLLM's weight cache would hand parameters on that have no memory of their own, and skip what is done to them
        method.supports_pre_processed_weights = False
    setattr(method, backend_attribute, backend)
    method.experts_cls = experts_cls
    method.process_weights_after_loading = process_weights_after_loading
    loading.expect(method)
