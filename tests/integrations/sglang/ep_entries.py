"""What ranks do in tests: SGLang's groups over gloo, its layer, dispatcher, loader and all-reduce, with our experts."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest

import tests.integrations.sglang.conftest  # noqa: F401 - first, as pytest has it: torchvision's operators

# ruff: isort: split
from sglang.srt.distributed import parallel_state
from sglang.srt.layers.moe.token_dispatcher import standard
from sglang.srt.runtime_context import get_parallel

from epfuse.integrations.sglang.experts import EpfuseMoEMethod
from epfuse.integrations.sglang.rules import NAME
from epfuse.parallel.launch import RankContext
from tests.integrations.sglang.deployment import Deployment, checkpoint, expected, installed, load, routes

LAYOUTS = {"TP2": (2, 1), "EP2": (2, 2), "EP4": (4, 4), "EP2 with TP2": (4, 2)}
"""Ranks that share a layer, over how many of them its experts are spread; four processes are one or two of these."""
TOKENS = (1, 37)


def shares(context: RankContext, quantized: bool) -> dict[str, list[tuple[float, float]]]:
    """By layout, of each number of tokens the relative error of the sum against float64, and of this rank's share."""
    found = {}
    with pytest.MonkeyPatch.context() as patch, installed():
        patch.setenv("EPFUSE_STRICT", "1")
        patch.setattr(standard, "get_device", lambda: "cpu")
        # ending groups imports SGLang's way to start servers, which wants this
        patch.setitem(sys.modules, "uvicorn", ModuleType("uvicorn"))
        for name, (ranks, ep) in LAYOUTS.items():
            rank = context.group.rank % ranks
            deployment = Deployment(quantized=quantized, ep=ep, tp=ranks // ep, rank=rank)
            deployment = replace(
                deployment,
                server={"moe_runner_backend": NAME},
                layer={**deployment.layer, "reduce_results": True},
                stages=context.group.size // ranks,
            )
            with deployment.entered(patch):
                here = context.group.rank
                parallel_state.init_distributed_environment(context.group.size, here, local_rank=here, backend="gloo")
                parallel_state.initialize_model_parallel(backend="gloo")
                try:
                    found[name] = _errors(deployment, quantized)
                finally:
                    parallel_state.destroy_model_parallel()
    return found


def _errors(deployment: Deployment, quantized: bool) -> list[tuple[float, float]]:
    weights = checkpoint(quantized=quantized)
    group = parallel_state._TP  # `get_tp_group` gives what the deployment has in its place
    layer = deployment.build()
    assert isinstance(layer.quant_method, EpfuseMoEMethod)
    load(layer, weights)
    layer.quant_method.process_weights_after_loading(layer)
    found = []
    with get_parallel().override(tp_group=group):
        for tokens in TOKENS:
            hidden, topk = routes(tokens, seed=tokens)
            truth = expected(weights, hidden, topk)
            own = layer.quant_method.apply(layer, layer.dispatcher.dispatch(hidden, topk)).hidden_states
            found.append(tuple(float((y.double() - truth).norm() / truth.norm()) for y in (layer(hidden, topk), own)))
    return found
