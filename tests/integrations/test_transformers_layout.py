"""Models that are more than their experts' weights: each right, or refused by the module's name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("transformers")

from epfuse.config import Path as ExpertsPath
from epfuse.config import WeightFormat
from epfuse.errors import ConfigError, DtypeError, EpfuseError, LayoutError, ShapeError
from epfuse.integrations.transformers import EPExperts, replace_experts
from epfuse.parallel.group import EPGroup
from epfuse.parallel.shard import shard_experts
from tests.integrations.test_transformers_families import experts_of


def layer(**changes: Any) -> Any:
    return nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts_of("qwen3_moe.Qwen3MoeExperts", **changes)})})


def call(experts: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(9, 8, generator=generator).to(experts.gate_up_proj.dtype)
    ids = torch.rand(9, 5, generator=generator).topk(2).indices
    return experts(hidden, ids, torch.rand(9, 2, generator=generator).to(hidden.dtype))


def refused(block: Any, match: str, error: type[EpfuseError] = LayoutError) -> None:
    before = block["mlp"]["experts"]
    with pytest.raises(error, match=match):
        replace_experts(block, EPGroup.single())
    assert block["mlp"]["experts"] is before


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """One rank of a real device mesh."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_experts_under_tensor_parallelism_are_refused(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    block = layer()
    experts = block["mlp"]["experts"]
    experts.down_proj = nn.Parameter(distribute_tensor(experts.down_proj.detach(), mesh, [Shard(2)]))
    refused(block, r"mlp\.experts \(Qwen3MoeExperts\): down_proj is a DTensor.*without a tensor-parallel plan")
    with pytest.raises(LayoutError, match="full is a DTensor"):
        shard_experts(experts.down_proj, EPGroup.single().expert_map(5))


def test_a_model_that_transformers_split_is_refused(mesh: Any) -> None:
    """transformers' own styles, as its tensor and expert parallel plans apply them."""
    parallel = pytest.importorskip("transformers.distributed.expert_parallel")
    from torch.distributed.tensor import Shard

    block = layer()
    style = parallel.MoEParamShard(Shard(0), shards_expert_dim=True)
    style.shard_param(block["mlp"]["experts"], "gate_up_proj", mesh)
    refused(block, r"mlp\.experts \(Qwen3MoeExperts\): gate_up_proj is a DTensor")
    block = layer()
    style.install_forward(block["mlp"]["experts"], mesh)
    refused(block, r"mlp\.experts \(Qwen3MoeExperts\) has a forward of its own")
    block = layer()
    block["mlp"]["experts"]._is_expert_parallel = True
    refused(block, "one rank's share already")


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_are_refused_not_lost(kind: str) -> None:
    block = layer()
    handle = getattr(block["mlp"]["experts"], f"register_{kind}_hook")(lambda *_: None)
    refused(block, rf"mlp\.experts \(Qwen3MoeExperts\) has hooks \({kind}\), which would be lost")
    handle.remove()
    replace_experts(block, EPGroup.single())


class Adapter(nn.Module):
    """What PEFT puts around a module whose parameters it adapts."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(torch.zeros(2, 8))

    def forward(self, *args: Any) -> torch.Tensor:
        return self.base_layer(*args) + 1


class Compiled(nn.Module):
    """What torch.compile makes of a module: its attributes are the other's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._modules["_orig_mod"], name)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_adapters_parametrizations_and_wrappers_are_refused() -> None:
    block = layer()
    block["mlp"]["experts"] = Adapter(block["mlp"]["experts"])
    refused(block, r"mlp\.experts\.base_layer \(Qwen3MoeExperts\) has an adapter around it")
    block = layer()
    nn.utils.parametrize.register_parametrization(block["mlp"]["experts"], "gate_up_proj", Doubled())
    refused(block, r"mlp\.experts .* has no parameter gate_up_proj of its own")
    block = layer()
    block["mlp"]["experts"].lora_A = nn.Parameter(torch.zeros(2, 8))
    refused(block, r"mlp\.experts \(Qwen3MoeExperts\) has other tensors \(lora_A\)")
    block = layer()
    block["mlp"]["experts"].register_buffer("scale", torch.ones(5))
    refused(block, r"other tensors \(scale\)")
    block = layer()
    block["mlp"]["experts"] = Compiled(block["mlp"]["experts"])
    refused(block, r"mlp\.experts \(Compiled\) has no parameter gate_up_proj of its own")


def test_quantised_experts_are_refused() -> None:
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    block = layer()
    config = copy.copy(block["mlp"]["experts"].config)
    block["mlp"]["experts"] = finegrained.FP8Experts(config, block_size=(4, 4))
    refused(block, r"mlp\.experts \(FP8Experts\): gate_up_proj has dtype torch\.float8_e4m3fn.*dequantise", DtypeError)

    class Packed(torch.Tensor):
        pass

    block = layer()
    packed = block["mlp"]["experts"].gate_up_proj.detach().as_subclass(Packed)
    block["mlp"]["experts"].gate_up_proj = nn.Parameter(packed, requires_grad=False)
    refused(block, "gate_up_proj is a Packed")
    block = layer()
    block["mlp"]["experts"].gate_up_proj = nn.Parameter(torch.zeros(64, 1))
    refused(block, r"gate_up_proj \(64, 1\)", ShapeError)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_that_are_taken(dtype: torch.dtype) -> None:
    block = layer().to(dtype)
    exact = call(copy.deepcopy(block["mlp"]["experts"]).double())
    replace_experts(block, EPGroup.single())
    got = call(block["mlp"]["experts"])
    assert got.dtype == dtype
    assert float((got.double() - exact).norm() / exact.norm()) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.complex64])
def test_dtypes_that_are_refused(dtype: torch.dtype) -> None:
    block = layer()
    experts = block["mlp"]["experts"]
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, nn.Parameter(getattr(experts, name).detach().to(dtype), requires_grad=False))
    refused(block, rf"mlp\.experts \(Qwen3MoeExperts\): gate_up_proj has dtype {dtype}", DtypeError)


def test_weights_that_disagree_are_refused_by_name() -> None:
    block = layer()
    block["mlp"]["experts"].down_proj.data = block["mlp"]["experts"].down_proj.data.bfloat16()
    refused(block, r"mlp\.experts \(Qwen3MoeExperts\): w13 is in torch\.float32 and w2 in torch\.bfloat16", DtypeError)
    with pytest.raises(ShapeError, match=r"mlp\.experts \(Qwen3MoeExperts\): .*multiple of 32"):
        replace_experts(layer(), EPGroup.single(), form=WeightFormat.MXFP8)


@torch.no_grad()
def test_a_module_in_two_places_stays_one() -> None:
    block = layer()
    shared = block["mlp"]["experts"]
    block["again"] = nn.ModuleDict({"experts": shared})
    expected = call(shared)
    replacement = replace_experts(block, EPGroup.single())
    assert list(replacement.experts) == ["mlp.experts", "again.experts"]
    assert block["mlp"]["experts"] is block["again"]["experts"]
    torch.testing.assert_close(call(block["again"]["experts"]), expected)
    assert set(replacement.sharded_parameters) == {
        f"{place}.experts.{leaf}" for place in ("mlp", "again") for leaf in ("gate_up_proj", "down_proj")
    }
    replacement.revert()
    assert block["mlp"]["experts"] is block["again"]["experts"] is shared


@torch.no_grad()
def test_experts_that_share_parameters_are_right() -> None:
    block = layer()
    block["second"] = experts_of("qwen3_moe.Qwen3MoeExperts")
    block["second"].gate_up_proj = block["mlp"]["experts"].gate_up_proj
    expected = call(block["second"])
    replace_experts(block, EPGroup.single())
    torch.testing.assert_close(call(block["second"]), expected)


@torch.no_grad()
def test_strided_weights_are_right() -> None:
    block = layer()
    experts = block["mlp"]["experts"]
    expected = call(experts)
    for name in ("gate_up_proj", "down_proj"):
        strided = getattr(experts, name).detach().mT.contiguous().mT
        assert not strided.is_contiguous()
        setattr(experts, name, nn.Parameter(strided))
    replace_experts(block, EPGroup.single())
    torch.testing.assert_close(call(block["mlp"]["experts"]), expected)


def test_training_mode_is_kept_and_gradients_are_refused() -> None:
    block = layer().eval()
    replace_experts(block, EPGroup.single())
    experts = block["mlp"]["experts"]
    assert not experts.training
    assert replace_experts(layer().train(), EPGroup.single()).experts["mlp.experts"].training
    hidden, ids, weights = torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    assert not experts(hidden, ids, weights).requires_grad
    with pytest.raises(ConfigError, match=r"hidden_states requires grad.*no_grad"):
        experts(hidden.requires_grad_(), ids, weights)
    with pytest.raises(ConfigError, match="top_k_weights requires grad"):
        experts(hidden.detach(), ids, weights.requires_grad_())
    experts.requires_grad_(True)
    with pytest.raises(ConfigError, match="gate_up_proj requires grad"):
        experts(hidden.detach(), ids, weights.detach())
    with torch.no_grad():
        experts(hidden, ids, weights)


def test_meta_models_and_more_ranks_than_experts() -> None:
    shares = []
    for rank in range(7):
        block = layer().to("meta")
        shares.append(replace_experts(block, EPGroup(rank, 7)).experts["mlp.experts"])
        assert shares[-1].gate_up_proj.is_meta
    assert [share.gate_up_proj.shape[0] for share in shares] == [1, 1, 1, 1, 1, 0, 0]
    share = replace_experts(layer(), EPGroup(6, 7)).experts["mlp.experts"]
    with torch.no_grad():
        none = share.local_output(torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    assert torch.equal(none, torch.zeros(3, 8))


def test_arguments_of_other_types_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"path is 'bf16'; it must be an epfuse\.Path"):
        replace_experts(layer(), EPGroup.single(), path="bf16")
    with pytest.raises(ConfigError, match="form is 'mxfp8'"):
        replace_experts(layer(), EPGroup.single(), form="mxfp8")
    with pytest.raises(ConfigError, match="is an experts module itself"):
        replace_experts(experts_of("qwen3_moe.Qwen3MoeExperts"), EPGroup.single())
    share = replace_experts(layer(), EPGroup.single(), path=ExpertsPath.REFERENCE).experts["mlp.experts"]
    assert isinstance(share, EPExperts)
