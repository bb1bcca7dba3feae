"""What tools.serve_on_gpu puts in the place of vLLM's own fits each release: dummy weights, and MiniMax-M3's norms."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm
from tools.serve_on_gpu import dummy, m3
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import dummy_loader
from vllm.transformers_utils import config as model_configs


class GemmaNorm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((8,), 7.0))


class Experts(torch.nn.Module):
    """A layer with what vLLM's have: E8M0 scales, a norm below it, and buffers that are no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = GemmaNorm()
        self.w13_weight_scale = torch.nn.Parameter(torch.zeros(4, 32, dtype=torch.uint8), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.full((4,), 7.0))
        self.register_buffer("expert_map", torch.arange(4))
        self.register_buffer("k_scale", torch.tensor(1.0))


@pytest.fixture
def loader(monkeypatch):
    for name in ("initialize_dummy_weights", "initialize_single_dummy_weight"):
        monkeypatch.setattr(dummy_loader, name, getattr(dummy_loader, name, None), raising=False)
    monkeypatch.setattr(dummy_loader.DummyModelLoader, "load_weights", dummy_loader.DummyModelLoader.load_weights)
    dummy.use()
    return dummy_loader.DummyModelLoader(LoadConfig(load_format="dummy"))


def test_dummy_weights_are_numbers_and_buffers_stay(loader):
    model = Experts()
    loader.load_weights(model, SimpleNamespace())
    assert model.norm.weight.tolist() == [0] * 8  # it adds one
    assert model.bias.tolist() == [0] * 4
    low, high = dummy.SCALES
    assert low <= model.w13_weight_scale.min()
    assert model.w13_weight_scale.max() < high
    assert model.expert_map.tolist() == [0, 1, 2, 3]
    assert model.k_scale == 1


def test_what_is_quantised_while_loading_gets_numbers_too(loader):
    tensor = torch.zeros(2, 4, 8)
    dummy_loader.initialize_single_dummy_weight(tensor)
    assert tensor.std() > 0.1


def test_minimax_m3_has_the_norms_that_need_no_flashinfer(monkeypatch):
    registered = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setattr("vllm.model_executor.models.registry.ModelRegistry", registry)
    monkeypatch.setattr(model_configs, "_CONFIG_REGISTRY", type(model_configs._CONFIG_REGISTRY)())
    m3.register()
    assert model_configs._CONFIG_REGISTRY["minimax_m3_text"].__name__ == "MiniMaxM3TextConfig"
    assert registered == {m3.CLASS: f"tools.serve_on_gpu.m3_model:{m3.CLASS}"}
    # read, not imported: the model needs torchvision and compiled operators
    package = Path(vllm.__file__).parent / "models" / "minimax_m3"
    operators = ast.parse((package / "amd" / "ops" / "gemma_rmsnorm.py").read_text())
    arguments = {node.name: [one.arg for one in node.args.args] for node in ast.walk(operators)
                 if isinstance(node, ast.FunctionDef)}  # fmt: skip
    assert arguments["gemma_rmsnorm"] == ["x", "weight", "eps"]
    assert arguments["gemma_fused_add_rmsnorm"] == ["x", "residual", "weight", "eps"]
    classes = {node.name: node for node in ast.parse((package / "nvidia" / "model.py").read_text()).body
               if isinstance(node, ast.ClassDef)}  # fmt: skip
    assert m3.CLASS in classes
    norm = ast.unparse(classes["MiniMAXGemmaRMSNorm"])
    assert "self.weight = " in norm
    assert "self.variance_epsilon = " in norm
