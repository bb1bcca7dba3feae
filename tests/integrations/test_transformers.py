from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from epfuse import ExpertMap, ExpertWeights, SwiGLUOAI
from epfuse.config import WeightFormat
from epfuse.demo.model import build_model, round_experts_to_mxfp8, seed_weights
from epfuse.demo.settings import ModelSize
from epfuse.errors import ConfigError, EpfuseError, ShapeError
from epfuse.integrations.transformers import EPExperts, replace_experts
from epfuse.parallel.group import EPGroup
from epfuse.weights.checkpoint import load_sharded, save_checkpoint

SIZE = ModelSize(hidden=64, intermediate=32, dense_intermediate=64, moe_layers=2, experts=16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are too small to gain from threads, and their spinning costs seconds on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> Any:
    model = build_model(SIZE, torch.float32, "cpu")
    seed_weights(model, 0)
    return model


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(1))


def qwen3_experts(**changes: Any) -> Any:
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=16, num_experts=8, **changes)
    config._experts_implementation = "eager"
    experts = Qwen3MoeExperts(config)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.2)
    return experts


@torch.no_grad()
def test_one_rank_computes_the_same_logits_and_reverts(model: Any, prompt: torch.Tensor) -> None:
    before = model(prompt).logits
    names = [name for name, module in model.named_modules() if name.endswith("mlp.experts")]
    originals = [model.get_submodule(name) for name in names]

    replacement = replace_experts(model, EPGroup.single())
    assert list(replacement.experts) == names
    assert all(isinstance(model.get_submodule(name), EPExperts) for name in names)
    torch.testing.assert_close(model(prompt).logits, before, rtol=0, atol=1e-4)

    replacement.revert()
    assert [model.get_submodule(name) for name in names] == originals
    assert torch.equal(model(prompt).logits, before)
    replacement.revert()
    assert [model.get_submodule(name) for name in names] == originals


@torch.no_grad()
def test_sum_of_the_ranks_shares_is_transformers_experts(model: Any) -> None:
    whole = model.model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(37, SIZE.hidden, generator=generator)
    ids = torch.rand(37, SIZE.experts, generator=generator).topk(SIZE.top_k).indices
    weights = torch.rand(37, SIZE.top_k, generator=generator)
    expected = whole(hidden, ids, weights)
    total = torch.zeros_like(hidden)
    for rank in range(4):
        replacement = replace_experts(model, EPGroup(rank, 4))
        share = replacement.experts["model.layers.1.mlp.experts"]
        assert share.gate_up_proj.shape[0] == SIZE.experts // 4
        total += share.local_output(hidden, ids, weights)
        replacement.revert()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_a_rank_loads_only_its_shard(model: Any, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path / "model.safetensors")
    empty = build_model(SIZE, torch.float32, "meta")
    replacement = replace_experts(empty, EPGroup(1, 2))
    load_sharded(empty, tmp_path / "model.safetensors", replacement.sharded_parameters, torch.device("cpu"))
    whole = dict(model.named_parameters()) | dict(model.named_buffers())
    loaded = dict(empty.named_parameters()) | dict(empty.named_buffers())
    assert loaded.keys() == whole.keys()
    for name, tensor in loaded.items():
        expected = whole[name][SIZE.experts // 2 :] if name in replacement.sharded_parameters else whole[name]
        assert torch.equal(tensor, expected), name


def test_loading_refuses_another_models_checkpoint(model: Any, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path / "model.safetensors")
    other = build_model(ModelSize(hidden=32, moe_layers=2, experts=16), torch.float32, "meta")
    with pytest.raises(ShapeError, match=r"model\.safetensors"):
        load_sharded(other, tmp_path / "model.safetensors", {}, torch.device("cpu"))


@torch.no_grad()
def test_silu_experts_of_another_model() -> None:
    block = nn.ModuleDict({"experts": qwen3_experts()})
    hidden, ids = torch.randn(9, 32), torch.rand(9, 8).topk(2).indices
    weights = torch.rand(9, 2)
    expected = block["experts"](hidden, ids, weights)
    replace_experts(block, EPGroup.single())
    for dtype in (torch.int64, torch.int16, torch.uint8):
        torch.testing.assert_close(block["experts"](hidden, ids.to(dtype), weights), expected, rtol=1e-5, atol=1e-6)


def test_refuses_an_unknown_activation() -> None:
    block = nn.ModuleDict({"experts": qwen3_experts(hidden_act="gelu")})
    with pytest.raises(ConfigError, match="activation that epfuse does not know"):
        replace_experts(block, EPGroup.single())


@torch.no_grad()
@pytest.mark.parametrize("form", [WeightFormat.DENSE, WeightFormat.MXFP8])
def test_gpt_oss_is_taken_out_of_its_layout(form: WeightFormat, tmp_path: Path) -> None:
    """Interleaved, transposed, with biases; H equals I, so that no shape tells which way round a matrix lies."""
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=32, intermediate_size=32, num_local_experts=4)
    config._experts_implementation = "eager"
    experts = GptOssExperts(config)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.5)
    hidden, ids, factors = torch.randn(9, 32), torch.rand(9, 4).topk(2).indices, torch.rand(9, 2)
    expected = experts(hidden, ids, factors)
    block = nn.ModuleDict({"experts": experts})
    save_checkpoint(block, tmp_path / "model.safetensors")
    replacement = replace_experts(block, EPGroup.single(), form=form)
    found = block["experts"](hidden, ids, factors)
    assert (found - expected).norm() <= (1e-6 if form is WeightFormat.DENSE else 0.1) * expected.norm()
    for names in ([name for name, _ in block.named_parameters()], replacement.sharded_parameters):
        assert not any("proj" in name for name in names)  # a checkpoint's tensors lie otherwise
    with pytest.raises(EpfuseError):
        load_sharded(block, tmp_path / "model.safetensors", replacement.sharded_parameters, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="Missing key"):
        block.load_state_dict({f"experts.{name}": tensor for name, tensor in experts.state_dict().items()})


def test_refuses_transposed_weights_without_flags() -> None:
    experts = qwen3_experts()
    experts.down_proj = nn.Parameter(experts.down_proj.detach().transpose(1, 2).contiguous())
    with pytest.raises(ShapeError, match="down_proj"):
        replace_experts(nn.ModuleDict({"experts": experts}), EPGroup.single())


def test_refuses_a_model_without_experts_and_a_second_replacement(model: Any) -> None:
    with pytest.raises(ConfigError, match="nothing to replace"):
        replace_experts(nn.Linear(2, 2), EPGroup.single())
    replace_experts(model, EPGroup.single())
    with pytest.raises(ConfigError, match="replaced already"):
        replace_experts(model, EPGroup.single())


def test_refuses_what_is_no_model_or_group(model: Any) -> None:
    with pytest.raises(ConfigError, match="group is None"):
        replace_experts(model, cast("Any", None))
    with pytest.raises(ConfigError, match="model is 'model'"):
        replace_experts(cast("Any", "model"), EPGroup.single())


def test_an_error_in_the_last_layer_replaces_none(model: Any) -> None:
    last = model.model.layers[-1].mlp.experts
    last.is_transposed = True
    with pytest.raises(EpfuseError, match=r"layers\.2"):
        replace_experts(model, EPGroup.single())
    assert not any(isinstance(module, EPExperts) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("ranks", [3, 5])
def test_ranks_that_do_not_divide_the_experts_add_up(model: Any, ranks: int) -> None:
    """16 experts: the first ranks hold one more."""
    whole = model.model.layers[1].mlp.experts
    hidden = torch.randn(9, SIZE.hidden, generator=torch.Generator().manual_seed(3))
    ids = torch.rand(9, 16, generator=torch.Generator().manual_seed(4)).topk(4).indices
    weights = torch.rand(9, 4, generator=torch.Generator().manual_seed(5))
    total, held = torch.zeros_like(hidden), []
    for rank in range(ranks):
        replacement = replace_experts(model, EPGroup(rank, ranks))
        share = replacement.experts["model.layers.1.mlp.experts"]
        held.append(share.gate_up_proj.shape[0])
        total += share.local_output(hidden, ids, weights)
        replacement.revert()
    assert sum(held) == 16
    assert held == sorted(held, reverse=True)
    torch.testing.assert_close(total, whole(hidden, ids, weights), rtol=1e-5, atol=1e-5)


def test_refuses_gradients(model: Any, prompt: torch.Tensor) -> None:
    replace_experts(model, EPGroup.single())
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="no_grad"):
        model(prompt)


@torch.no_grad()
def test_mxfp8_experts_load_their_shard_and_compute_what_their_numbers_say(
    model: Any, prompt: torch.Tensor, tmp_path: Path
) -> None:
    round_experts_to_mxfp8(model)
    expected = model(prompt).logits
    whole = replace_experts(model, EPGroup.single(), form=WeightFormat.MXFP8)
    assert "gate_up_proj_scale" in dict(whole.experts["model.layers.1.mlp.experts"].named_parameters())
    torch.testing.assert_close(model(prompt).logits, expected, rtol=0, atol=1e-4)

    save_checkpoint(model, tmp_path / "model.safetensors")
    empty = build_model(SIZE, torch.float32, "meta")
    shard = replace_experts(empty, EPGroup(1, 2), form=WeightFormat.MXFP8)
    load_sharded(empty, tmp_path / "model.safetensors", shard.sharded_parameters, torch.device("cpu"))
    for name, part in shard.experts.items():
        for leaf, tensor in part.named_parameters():
            full = whole.experts[name].get_parameter(leaf)
            assert torch.equal(tensor.view(torch.uint8), full[SIZE.experts // 2 :].view(torch.uint8)), leaf


def test_only_formats_of_checkpoints_can_be_parameters(model: Any) -> None:
    with pytest.raises(ConfigError, match="form is 'block_fp8'; experts are replaced by dense or mxfp8 ones"):
        replace_experts(model, EPGroup.single(), form=WeightFormat.BLOCK_FP8)
    dense = ExpertWeights.dense(torch.zeros(2, 64, 32), torch.zeros(2, 32, 32))
    stacks = ExpertWeights.quantize(dense).mxfp8_experts
    hybrid = ExpertWeights.hybrid(stacks.w13.values, stacks.w13.scales, stacks.w2.values, stacks.w2.scales)
    with pytest.raises(ConfigError, match="weights are in mxfp8, dense; EPExperts takes dense or MXFP8"):
        EPExperts(hybrid, ExpertMap.all_local(2), SwiGLUOAI(), EPGroup.single())


def test_prepare_changes_nothing_on_a_cpu() -> None:
    """There the kernels read checkpoints' order; on Hopper the parameters' memory is rearranged (tests/weights)."""
    torch.manual_seed(0)
    weights = ExpertWeights.quantize(ExpertWeights.dense(torch.randn(4, 64, 64), torch.randn(4, 64, 32)))
    experts = EPExperts(weights, ExpertMap.all_local(4), SwiGLUOAI(), EPGroup.single())
    hidden, ids = torch.randn(3, 64).bfloat16(), torch.tensor([[0, 1], [2, 3], [1, 3]])
    before = experts(hidden, ids, torch.rand(3, 2, generator=torch.Generator().manual_seed(1)))
    experts.prepare()
    after = experts(hidden, ids, torch.rand(3, 2, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(before, after)
