"""What SGLang's layer launches beside what is compiled for it, in a process that doesn't interpret kernels."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

import tests.integrations.sglang.conftest  # noqa: F401 - first, as pytest has it: torchvision's operators

# ruff: isort: split
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.model_loader.loader import DefaultModelLoader

from epfuse.aot.launches import Launch, launches_of
from epfuse.compiled.layer import kernels
from epfuse.compiled.model import layers_of
from epfuse.integrations.load import LoadedLayer
from epfuse.integrations.sglang import experts
from epfuse.integrations.sglang.rules import NAME
from epfuse.target import Target
from tests.integrations.sglang.deployment import Deployment, installed

E, H, I, K = 8, 256, 256, 2  # noqa: E741
CHUNK = 300
RANKS = ((1, 1), (4, 1), (1, 2))
"""Over which experts are spread, and I is split."""
IDS = (torch.int32, torch.int64)
"""Of routers."""


@dataclass(frozen=True)
class Compared:
    """One deployment.

    Attributes:
        name: which.
        most: tokens that its kernels were asked for.
        launched: how many kernels its calls have launched.
        strangers: those that were not compiled.
    """

    name: str
    most: int | None
    launched: int
    strangers: list[str]


def compare() -> list[Compared]:
    """Every target, format and layout."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPFUSE_STRICT", "1")
        patch.setattr("sglang.srt.layers.moe.token_dispatcher.standard.get_device", lambda: "cpu")
        for target, quantized, (ep, tp) in itertools.product((Target.SM90, Target.GFX942), (True, False), RANKS):
            server = {"moe_runner_backend": NAME, "chunked_prefill_size": CHUNK}
            deployment = Deployment(target, quantized, ep, tp, rank=ep * tp - 1, server=server, sizes=(E, H, I, K))
            found.append(_compare(deployment, patch))
    return found


def _compare(deployment: Deployment, patch: pytest.MonkeyPatch) -> Compared:
    warmed: list[tuple[LoadedLayer, int | None]] = []
    patch.setattr(experts, "warm", lambda loaded, most, log: warmed.append((loaded, most)))
    with installed(), deployment.entered(patch):
        layer = deployment.build()
        for parameter in layer.parameters():
            parameter.data.view(torch.uint8).fill_(1)
        DefaultModelLoader.postprocess_weights(layer, torch.device("cpu"))
        ((loaded, most),) = warmed
        named = {launch for one in layers_of(loaded.plan) for launch in kernels(one, most or 1)}

        def calls() -> None:
            for tokens, ids in itertools.product((1, 2, 7, 64, 133, CHUNK), IDS):
                routes = torch.zeros(tokens, K, dtype=ids)
                topk = StandardTopKOutput(torch.ones(tokens, K), routes, torch.zeros(tokens, E))
                layer(torch.zeros(tokens, H, dtype=torch.bfloat16), topk)

        product = loaded.plan.request.device_name
        launched: set[Launch] = set(launches_of(loaded.plan.request.target, calls, product, stand_in="cpu"))
    return Compared(str(deployment), most, len(launched), [launch.kernel for launch in launched - named])
