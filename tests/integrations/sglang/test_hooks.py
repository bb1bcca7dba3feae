"""Which layers are taken, what starts where, and that nothing differs without the plugin."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.quantization.fp8 import Fp8Config

from epfuse.errors import ConfigError
from epfuse.integrations.sglang import hooks, plugin, releases
from epfuse.integrations.sglang.experts import EpfuseMoEMethod
from epfuse.integrations.sglang.interfaces import SGLANG, USES
from epfuse.integrations.sglang.rules import NAME
from epfuse.target import Target
from tests.integrations.sglang.deployment import MXFP8_CONFIG, SWIGLU_OAI, Deployment, installed


def test_the_record_is_what_the_release_has():
    assert SGLANG.read(releases.package()) == SGLANG.known[releases.installed()]
    assert SGLANG.digests[SGLANG.digest(releases.package())] == releases.installed()
    assert tuple(SGLANG.known) == releases.TESTED
    for uses in SGLANG.known.values():
        assert list(uses) == [str(use) for use in USES]
        assert all(uses.values())


@pytest.mark.parametrize("asked", ["auto", NAME, "triton"])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("target", [Target.SM90, Target.GFX942, Target.GFX950, Target.CPU, None])
def test_who_runs_the_experts(asked, quantized, target, monkeypatch):
    deployment = Deployment(target=target, quantized=quantized, server={"moe_runner_backend": asked})
    only_ours = quantized and target is Target.SM90
    with installed(), deployment.entered(monkeypatch):
        if (asked == NAME and target is None) or (asked == "triton" and only_ours):
            with pytest.raises(ConfigError):
                deployment.build()
            return
        layer = deployment.build()
    ours = asked == NAME or (asked == "auto" and quantized and target in (Target.SM90, Target.GFX942, Target.CPU))
    assert isinstance(layer.quant_method, EpfuseMoEMethod) == ours


def test_layers_that_fail_alike_are_left_to_sglang_and_said_once(monkeypatch):
    """A model has sixty of them."""
    said = []
    monkeypatch.setattr(hooks.log, "exception", lambda form, *args: said.append(form % args))
    monkeypatch.setattr(hooks, "_said", set())
    monkeypatch.setattr(hooks, "decide", lambda offer: [][0])
    deployment = Deployment(target=Target.GFX942)
    with installed(), deployment.entered(monkeypatch):
        monkeypatch.setenv("EPFUSE_STRICT", "0")
        assert not any(isinstance(deployment.build().quant_method, EpfuseMoEMethod) for _ in range(3))
    assert len(said) == 1
    assert said[0].endswith("to SGLang, and so each layer like it: asking failed")


@pytest.mark.parametrize(("chosen", "ours"), [("triton", True), ("deep_gemm", False)])
def test_what_sglang_makes_of_auto_is_no_users_choice(chosen, ours, monkeypatch):
    deployment = Deployment(target=Target.GFX942, chosen=chosen)
    with installed(), deployment.entered(monkeypatch):
        assert isinstance(deployment.build().quant_method, EpfuseMoEMethod) == ours


def test_sglang_names_triton_for_minimax_m3_on_rocm(monkeypatch):
    """Which is why that runner, not given by the user, must not count as one that was asked for."""
    from sglang.srt.arg_groups.model_overrides import minimax_m3
    from sglang.srt.runtime_context import get_server_args

    rocm = SimpleNamespace(is_hip=True, is_sm100=False, is_sm90=False, is_blackwell=False)
    monkeypatch.setattr(minimax_m3, "get_platform", lambda: rocm)
    config = SimpleNamespace(quantization_config=MXFP8_CONFIG, architectures=["MiniMaxM3SparseForCausalLM"])
    with Deployment().entered(monkeypatch):
        arguments = get_server_args()
        monkeypatch.setattr(arguments, "_quantization_explicitly_unset", False, raising=False)
        made = minimax_m3._minimax_m3_overrides(arguments, config)
    assert made["moe_runner_backend"] == "triton"


def test_mxfp8_starts_on_hopper_only_with_the_plugin(monkeypatch):
    with Deployment(target=Target.SM90).entered(monkeypatch):
        mxfp8, fp8 = Fp8Config.from_config(MXFP8_CONFIG), Fp8Config()
        before = mxfp8.get_min_capability(), fp8.get_min_capability()
        assert before[0] > hooks.HOPPER
        with installed():
            assert mxfp8.get_min_capability() == hooks.HOPPER
            assert fp8.get_min_capability() == before[1]
        assert (mxfp8.get_min_capability(), fp8.get_min_capability()) == before


def test_the_gate_stays_where_the_plugin_is_not_for(monkeypatch):
    with Deployment(target=None).entered(monkeypatch), installed():
        assert Fp8Config.from_config(MXFP8_CONFIG).get_min_capability() > hooks.HOPPER


def test_a_layer_that_nobody_runs_on_hopper_is_named(monkeypatch):
    deployment = Deployment(target=Target.SM90, layer={**SWIGLU_OAI, "gate_up_interleaved": True})
    said = r"SGLang has no MXFP8 experts for Hopper.*model\.layers\.3"
    with installed(), deployment.entered(monkeypatch), pytest.raises(ConfigError, match=said):
        deployment.build()


def test_without_the_plugin_nothing_differs(monkeypatch):
    from sglang.srt.layers.moe.moe_runner import runner
    from sglang.srt.layers.quantization import fp8, unquant

    methods = (fp8.Fp8MoEMethod.create_weights, unquant.UnquantizedFusedMoEMethod.create_weights)
    choices = list(hooks.MOE_RUNNER_BACKEND_CHOICES)
    with installed():
        assert NAME in hooks.MOE_RUNNER_BACKEND_CHOICES
        assert fp8.Fp8MoEMethod.create_weights is not methods[0]
    assert (fp8.Fp8MoEMethod.create_weights, unquant.UnquantizedFusedMoEMethod.create_weights) == methods
    assert choices == hooks.MOE_RUNNER_BACKEND_CHOICES
    assert NAME not in runner._CUSTOM_RUNNER_CORE_FACTORIES


@pytest.mark.parametrize("variable", ["EPFUSE_DISABLE"])
def test_disabled_it_registers_nothing(variable, monkeypatch):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(hooks, "install", lambda: pytest.fail("installed"))
    plugin._register_once.cache_clear()
    plugin.register()
    plugin._register_once.cache_clear()


def test_another_sglang_is_left_alone_with_one_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(releases, "package", lambda: tmp_path)
    monkeypatch.setattr(hooks, "install", lambda: pytest.fail("installed"))
    said = []
    monkeypatch.setattr(plugin.log, "warning", lambda form, *args: said.append(form % args))
    plugin._register_once.cache_clear()
    for _ in range(3):
        plugin.register()
    plugin._register_once.cache_clear()
    (text,) = said
    assert ", ".join(releases.TESTED) in text
    assert "is missing" in text


def test_sglang_finds_the_entry_point_and_calls_it(monkeypatch):
    from importlib.metadata import EntryPoint

    from sglang.srt import plugins

    entry = EntryPoint("epfuse", "epfuse.integrations.sglang.plugin:register", plugins.GENERAL_PLUGINS_GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] if group == entry.group else [])
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    called = []
    monkeypatch.setattr(hooks, "install", lambda: called.append(True))
    plugin._register_once.cache_clear()
    plugins.load_plugins()
    plugin._register_once.cache_clear()
    assert called == [True]


def test_names_restrict_it(monkeypatch):
    from importlib.metadata import EntryPoint

    from sglang.srt import plugins

    entry = EntryPoint("epfuse", "epfuse.integrations.sglang.plugin:register", plugins.GENERAL_PLUGINS_GROUP)
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry])
    assert plugins.load_plugins_by_group(plugins.GENERAL_PLUGINS_GROUP) == {}


def test_the_device_decides_the_target():
    from epfuse.integrations.sglang.facts import target_here

    with torch.device("cpu"):
        assert target_here() is Target.CPU
