"""Which layers are taken on a CPU: MXFP8 ones, for which vLLM has no CPU kernels; what it has some for is left."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="make test-vllm has it")

from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from epfuse.config import Path, Policy
from epfuse.environment import environment
from epfuse.integrations.choice import choose
from epfuse.integrations.vllm import layer, releases
from epfuse.integrations.vllm.experts import EpfuseExperts
from epfuse.integrations.vllm.stand_in import EpfuseRoutedExperts
from epfuse.policy import Storage
from epfuse.target import Target
from tests.integrations.vllm.deployments import M3_EP8, build

M3_ON_CPU = M3_EP8.but(target=Target.CPU)

REFUSES = releases.installed().startswith("0.25.1")
has_mxfp8 = pytest.mark.skipif(REFUSES, reason="vLLM 0.25.1 builds no MXFP8 experts on a CPU")


def experts_of(deployment, monkeypatch, layer_cls=EpfuseRoutedExperts) -> type:
    return build(deployment, monkeypatch, layer_cls).quant_method.experts_cls


@has_mxfp8
@pytest.mark.parametrize("quantization", ["modelopt", "compressed-tensors", "online"])
@pytest.mark.parametrize("ep_size", [1, 8])
def test_mxfp8_is_taken(quantization, ep_size, monkeypatch):
    deployment = M3_ON_CPU.but(quantization=quantization, ep_size=ep_size)
    assert experts_of(deployment, monkeypatch, RoutedExperts).__name__ == "Mxfp8EmulationTritonExperts"
    assert experts_of(deployment, monkeypatch) is EpfuseExperts


@has_mxfp8
def test_it_stays_mxfp8_and_runs_in_pytorch(monkeypatch):
    asked = []

    def remember(facts):
        asked.append(choose(facts))
        return asked[-1]

    monkeypatch.setattr(layer, "choose", remember)
    build(M3_ON_CPU, monkeypatch)
    (choice,) = asked
    assert choice.plan.storage is Storage.MXFP8
    assert {choice.plan.at(tokens).path for tokens in (1, 8192)} == {Path.W8A16}


@has_mxfp8
def test_the_seed_leaves_it(monkeypatch):
    monkeypatch.setenv("EPFUSE_POLICY", Policy.SEED_1782.value)
    environment.cache_clear()
    assert experts_of(M3_ON_CPU, monkeypatch).__name__ == "Mxfp8EmulationTritonExperts"


@pytest.mark.skipif(not REFUSES, reason="later releases build them")
def test_where_vllm_builds_none_there_are_none_to_replace(monkeypatch):
    with pytest.raises(ValueError, match="No MXFP8 MoE backends available"):
        build(M3_ON_CPU, monkeypatch)


def test_bf16_is_left(monkeypatch):
    deployment = M3_ON_CPU.but(quantization=None, activation="silu", alpha=None, beta=None, limit=None)
    own = experts_of(deployment, monkeypatch, RoutedExperts)
    assert experts_of(deployment, monkeypatch) is own
    assert own is not EpfuseExperts
