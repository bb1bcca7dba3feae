"""What is compiled before the server is ready, beside what SGLang's own layer and dispatcher then launch."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig
from sglang.srt.model_loader.loader import DefaultModelLoader

from epfuse.aot.tasks import start
from epfuse.integrations.load import LoadedLayer
from epfuse.integrations.sglang import experts
from epfuse.integrations.sglang.rules import NAME
from epfuse.integrations.sglang.settings import most_tokens
from tests.integrations.sglang import warm_entries
from tests.integrations.sglang.deployment import Deployment, installed


def test_calls_launch_what_was_compiled():
    """Of each rank's layer, with a router's ids in either dtype."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start) as pool:
        found = pool.submit(warm_entries.compare).result()
    assert len(found) == 12
    for compared in found:
        assert compared.most == warm_entries.CHUNK
        assert compared.launched > 3
        assert compared.strangers == [], compared.name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"chunked_prefill_size": 4096}, 4096),
        ({"chunked_prefill_size": 4096, "enable_dynamic_chunking": True}, 5120),
        ({"chunked_prefill_size": -1}, 16384),
        ({"chunked_prefill_size": -1, "context_length": 65536}, 65536),
        ({"chunked_prefill_size": 4096, "attn_dp_size": 8}, 32768),
        ({"chunked_prefill_size": 512, "max_running_requests": 1024}, 1024),
        (
            {
                "chunked_prefill_size": 512,
                "speculative_num_draft_tokens": 4,
                "cuda_graph_config": CudaGraphConfig(decode=PhaseConfig(max_bs=256)),
            },
            1024,
        ),
    ],
)
def test_the_most_tokens_of_a_call(given, expected, monkeypatch):
    with Deployment(server=given, tp=given.get("attn_dp_size", 1)).entered(monkeypatch):
        assert most_tokens() == expected


def test_weights_that_come_again_ask_for_the_same_kernels(monkeypatch):
    """Which `warm_up` then knows: an update while serving compiles nothing."""
    warmed: list[LoadedLayer] = []
    monkeypatch.setattr(experts, "warm", lambda loaded, most, log: warmed.append(loaded))
    cpu = torch.device("cpu")
    with installed(), Deployment(server={"moe_runner_backend": NAME}).entered(monkeypatch):
        layer = Deployment().build()
        for parameter in layer.parameters():
            parameter.data.view(torch.uint8).fill_(1)
        DefaultModelLoader.postprocess_weights(layer, cpu)
        DefaultModelLoader.restore_weights_before_loading(layer, cpu)
        DefaultModelLoader.postprocess_weights(layer, cpu)
    assert len(warmed) == 2
    assert warmed[0] is warmed[1]
