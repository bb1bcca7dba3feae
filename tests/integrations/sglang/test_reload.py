"""New weights in a layer that runs: exact, in the same memory, or refused before a byte is written."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.model_loader.loader import DefaultModelLoader

from epfuse.errors import ConfigError
from epfuse.integrations.sglang import hooks
from epfuse.integrations.sglang.rules import NAME
from epfuse.target import Target
from epfuse.weights.experts import ExpertWeights
from epfuse.weights.restore import restore_checkpoint_order, take_over_memory
from tests.integrations.sglang.deployment import Deployment, checkpoint, close, expected, installed, load, routes

CPU = torch.device("cpu")


@pytest.fixture
def layer(monkeypatch):
    deployment = Deployment(server={"moe_runner_backend": NAME})
    with installed(), deployment.entered(monkeypatch):
        built = deployment.build()
        load(built, checkpoint())
        DefaultModelLoader.postprocess_weights(built, CPU)
        yield built


def addresses(layer):
    weights = layer.quant_method._loaded.weights
    return [tensor.data_ptr() for kept in weights.kept.values() for _, tensor in kept.tensors()]


def test_sglangs_own_way_of_an_update(layer):
    hidden, topk = routes(4)
    before = addresses(layer)
    weights = checkpoint(seed=1)
    DefaultModelLoader.restore_weights_before_loading(layer, CPU)
    load(layer, weights)
    DefaultModelLoader.postprocess_weights(layer, CPU)
    assert addresses(layer) == before
    assert close(layer(hidden, topk), expected(weights, hidden, topk))


def test_a_partial_update_keeps_the_rest(layer):
    hidden, topk = routes(4)
    old, new = checkpoint(), checkpoint(seed=1)
    part = {key: value for key, value in new.items() if key[1] in (1, 5)}
    DefaultModelLoader.restore_weights_before_loading(layer, CPU)
    load(layer, part)
    DefaultModelLoader.postprocess_weights(layer, CPU)
    assert close(layer(hidden, topk), expected({**old, **part}, hidden, topk))


def test_a_load_over_rearranged_weights_is_refused_before_a_byte_is_written(layer):
    saved = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    for attempt in (
        lambda: load(layer, checkpoint(seed=1)),
        lambda: hooks.check_direct_load(
            torch.nn.ModuleDict({"experts": layer}), [("experts.w13_weight", torch.zeros(1))]
        ),
    ):
        with pytest.raises(ConfigError, match="begin_weight_update"):
            attempt()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.view(torch.uint8), saved[name].view(torch.uint8))


def test_a_call_between_is_refused(layer):
    DefaultModelLoader.restore_weights_before_loading(layer, CPU)
    with pytest.raises(ConfigError, match="before its weights are loaded"):
        layer(*routes(1))


@pytest.mark.parametrize("target", [Target.SM90, Target.GFX942, Target.GFX950])
@pytest.mark.parametrize("hidden", [128, 96])
def test_what_prepare_did_is_undone_and_done_again_in_place(target, hidden):
    generator = torch.Generator().manual_seed(2)

    def drawn():
        codes = [torch.randint(0, 256, size, generator=generator, dtype=torch.uint8) for size in sizes]
        for stack in codes:
            stack[(stack & 0x7F) == 0x7F] = 0
            stack[stack == 0x80] = 0  # FNUZ has no -0
        scales = [torch.randint(60, 130, (*size[:2], size[2] // 32), generator=generator) for size in sizes]
        return [stack.view(torch.float8_e4m3fn) for stack in codes], [scale.to(torch.uint8) for scale in scales]

    sizes = ((2, 256, hidden), (2, hidden, 128))
    (w13, w2), (s13, s2) = drawn()
    first = [tensor.view(torch.uint8).clone() for tensor in (w13, s13, w2, s2)]
    weights = ExpertWeights.mxfp8(w13, s13, w2, s2).prepare(target)
    restore_checkpoint_order(weights, (w13, w2), (s13, s2))
    for tensor, was in zip((w13, s13, w2, s2), first, strict=True):
        assert torch.equal(tensor.view(torch.uint8), was)
    (n13, n2), (m13, m2) = drawn()
    for tensor, new in zip((w13, s13, w2, s2), (n13, m13, n2, m2), strict=True):
        tensor.view(torch.uint8).copy_(new.view(torch.uint8))
    again = ExpertWeights.mxfp8(w13, s13, w2, s2).prepare(target)
    wanted = ExpertWeights.mxfp8(n13, m13, n2, m2).prepare(target)
    take_over_memory(weights, again)
    for kept, expected_kept in zip(weights.kept.values(), wanted.kept.values(), strict=True):
        for (_, tensor), (_, true) in zip(kept.tensors(), expected_kept.tensors(), strict=True):
            assert torch.equal(tensor.view(torch.uint8), true.view(torch.uint8))
