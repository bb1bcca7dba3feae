"""Registration with the vLLM that is on the path, and what `versions.py` says of it."""

from __future__ import annotations

import enum
import importlib.metadata
import importlib.util

import pytest
import vllm.platforms
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from epfuse.integrations.vllm import explain, layer, plugin, releases
from epfuse.integrations.vllm.stand_in import EpfuseRoutedExperts
from epfuse.policy import Checkpoint
from epfuse.target import Target
from epfuse.weights.model_config import MINIMAX_M3
from tests.integrations.vllm.deployments import M3_EP8, build, moe_config

GEMM_KINDS = ("dense", "indexed", "grouped_contiguous", "grouped_masked")


@pytest.fixture
def registry(monkeypatch):
    """vLLM's registry, emptied, and put back afterwards."""
    plugin._register_once.cache_clear()
    before = dict(op_registry_oot)
    op_registry_oot.clear()
    monkeypatch.setenv("EPFUSE_STRICT", "1")
    yield op_registry_oot
    op_registry_oot.clear()
    op_registry_oot.update(before)
    plugin._register_once.cache_clear()


def test_this_release_is_tested():
    assert releases.installed() in releases.TESTED


def test_registering_replaces_vllms_layer(registry, monkeypatch):
    plugin.register()
    plugin.register()
    assert registry["RoutedExperts"] is EpfuseRoutedExperts
    assert type(build(M3_EP8, monkeypatch, RoutedExperts)) is EpfuseRoutedExperts


def test_another_plugins_layer_is_left(registry, monkeypatch):
    said = []
    monkeypatch.setattr(layer.log, "warning", lambda form, *args: said.append(form % args))
    registry["RoutedExperts"] = RoutedExperts
    plugin.register()
    assert registry == {"RoutedExperts": RoutedExperts}
    assert "replaces vLLM's RoutedExperts already" in said[0]


def test_forcing_registers_with_an_untested_release(registry, monkeypatch):
    monkeypatch.setattr(releases, "package", lambda: None)
    monkeypatch.setenv("EPFUSE_VLLM_FORCE", "1")
    plugin.register()
    assert registry["RoutedExperts"] is EpfuseRoutedExperts


@pytest.mark.parametrize("target", [Target.GFX942, Target.GFX950, Target.SM90])
@pytest.mark.parametrize("checkpoint", [Checkpoint.MXFP8, Checkpoint.BF16])
def test_explain_knows_what_vllm_chooses(checkpoint, target, monkeypatch, registry):
    quantization = "modelopt" if checkpoint is Checkpoint.MXFP8 else None
    own = build(M3_EP8.but(target=target, quantization=quantization), monkeypatch, RoutedExperts)
    known = explain.OWN_EXPERTS[releases.installed()][target, checkpoint]
    assert own.quant_method.experts_cls.__name__ == known.name


@pytest.mark.parametrize("spread", [True, False])
def test_explain_knows_what_vllm_chooses_where_humming_is_installed(spread, monkeypatch):
    from vllm.model_executor.layers.fused_moe.experts import fused_humming_moe
    from vllm.model_executor.layers.fused_moe.oracle.mxfp8 import select_mxfp8_moe_backend

    monkeypatch.setattr(fused_humming_moe, "has_humming", lambda: True)
    if importlib.util.find_spec("vllm.utils.humming"):  # humming's own names, which are not here
        kinds = enum.Enum("GemmType", {kind.upper(): kind for kind in GEMM_KINDS})
        monkeypatch.setitem(vars(importlib.import_module("vllm.utils.humming")), "GemmType", kinds)
    vllm.platforms._current_platform.become(Target.SM90)
    _, own = select_mxfp8_moe_backend(moe_config(M3_EP8.but(target=Target.SM90, ep_size=8 if spread else 1)))
    serving = explain.Deployment(Target.SM90, releases.installed(), 8, spread, 9472)
    assert own.__name__ == explain.own_experts(MINIMAX_M3, serving).name
    assert any(name.startswith("humming") for name in importlib.metadata.requires("vllm"))
