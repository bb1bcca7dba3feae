"""SGLang's own layer, dispatcher and loaders with our experts, against float64."""

from __future__ import annotations

import pytest
import torch

from epfuse.errors import ConfigError
from epfuse.integrations.sglang.experts import EpfuseMoEMethod
from epfuse.integrations.sglang.rules import NAME
from tests.integrations.sglang.deployment import (
    SWIGLU_OAI,
    Deployment,
    checkpoint,
    close,
    expected,
    installed,
    load,
    routes,
)

ASKED = {"moe_runner_backend": NAME}


@pytest.fixture(autouse=True)
def plugin():
    with installed():
        yield


def shard_result(deployment, weights, hidden, topk, monkeypatch):
    """What one rank adds to the sum."""
    with deployment.entered(monkeypatch):
        layer = deployment.build()
        assert isinstance(layer.quant_method, EpfuseMoEMethod)
        load(layer, weights)
        layer.quant_method.process_weights_after_loading(layer)
        return layer(hidden, topk)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(("ep", "tp"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_sum_over_ranks_is_the_layer(quantized, ep, tp, tokens, monkeypatch):
    weights, (hidden, topk) = checkpoint(quantized=quantized), routes(tokens)
    total = torch.zeros(hidden.shape, dtype=torch.float64)
    monkeypatch.setattr("sglang.srt.layers.moe.token_dispatcher.standard.get_device", lambda: "cpu")
    for rank in range(ep * tp):
        deployment = Deployment(quantized=quantized, ep=ep, tp=tp, rank=rank, server=ASKED)
        total += shard_result(deployment, weights, hidden, topk, monkeypatch).double()
    assert close(total, expected(weights, hidden, topk))


def test_silu_and_a_scaling_factor(monkeypatch):
    weights, (hidden, topk) = checkpoint(), routes(3)
    deployment = Deployment(server=ASKED, layer={"routed_scaling_factor": 2.5})
    result = shard_result(deployment, weights, hidden, topk, monkeypatch)
    assert close(result, 2.5 * expected(weights, hidden, topk, silu=True))


def test_padding_rows_are_zero_and_leave_the_others_alone(monkeypatch):
    weights, (hidden, topk) = checkpoint(), routes(4)
    padded = topk._replace(topk_ids=topk.topk_ids.clone())
    padded.topk_ids[2:] = -1
    result = shard_result(Deployment(server=ASKED), weights, hidden, padded, monkeypatch)
    assert not result[2:].any()
    assert close(result[:2], expected(weights, hidden[:2], topk._replace(
        topk_ids=topk.topk_ids[:2], topk_weights=topk.topk_weights[:2])))  # fmt: skip


@pytest.mark.parametrize(
    ("server", "layer", "reason"),
    [
        ({}, {"activation": "gelu"}, "activation is 'gelu"),
        ({}, {"is_gated": False}, "is_gated=False"),
        ({}, {"apply_router_weight_on_input": True}, "router weight is applied to the inputs"),
        ({}, {"no_combine": True}, "no_combine"),
        ({}, {"with_bias": True}, "biases"),
        ({}, {**SWIGLU_OAI, "gate_up_interleaved": True}, "gate_up_interleaved=True"),
        ({}, {**SWIGLU_OAI, "gemm1_beta": 0.5, "gemm1_clamp_limit": None}, "gemm1_beta=0.5"),
        ({"enable_eplb": True}, {}, "EPLB"),
        ({"enable_lora": True}, {}, "LoRA"),
        ({"enable_two_batch_overlap": True}, {}, "--enable-two-batch-overlap"),
        ({"enable_deterministic_inference": True}, {}, "--enable-deterministic-inference"),
        ({"elastic_ep_backend": "mooncake"}, {}, "--elastic-ep-backend"),
        ({"dwdp_size": 2}, {}, "--dwdp-size 2"),
    ],
)
def test_each_field_that_we_do_not_honour_is_refused_by_name(server, layer, reason, monkeypatch):
    deployment = Deployment(quantized="with_bias" not in layer, server={**ASKED, **server}, layer=layer)
    with deployment.entered(monkeypatch), pytest.raises(ConfigError) as caught:
        deployment.build()
    assert reason in str(caught.value)
    assert "model.layers.3.mlp.experts" in str(caught.value)


def test_calls_before_loading_and_in_other_forms_are_refused(monkeypatch):
    hidden, topk = routes(2)
    with Deployment(server=ASKED).entered(monkeypatch):
        layer = Deployment().build()
        with pytest.raises(ConfigError, match="before its weights are loaded"):
            layer(hidden, topk)
        load(layer, checkpoint())
        layer.quant_method.process_weights_after_loading(layer)
        quantised = layer.dispatcher.dispatch(hidden, topk)._replace(hidden_states_scale=torch.ones(2))
        with pytest.raises(ConfigError, match="quantised activations"):
            layer.quant_method.apply(layer, quantised)
