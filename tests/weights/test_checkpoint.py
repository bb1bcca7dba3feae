"""Sharded loading keeps bits or refuses by name, whatever the file holds."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file

from epfuse import ExpertMap, ExpertWeights, SwiGLUOAI
from epfuse.errors import CheckpointError, ConfigError, DtypeError, EpfuseError, LayoutError, ShapeError
from epfuse.integrations.transformers import EPExperts
from epfuse.numerics.reinterpret import reinterpret
from epfuse.parallel.group import EPGroup
from epfuse.target import Target
from epfuse.weights.checkpoint import load_sharded, save_checkpoint

CPU = torch.device("cpu")
EXPERTS = 5
SHARE = ExpertMap.contiguous(EXPERTS, 2, 1)
SHARDED = {f"experts.{part}{kind}": SHARE for part in ("gate_up_proj", "down_proj") for kind in ("", "_scale")}


def model(expert_map: ExpertMap, seed: int = 0) -> nn.ModuleDict:
    """A router, MXFP8 experts, a buffer and two tied weights."""
    torch.manual_seed(seed)
    dense = ExpertWeights.dense(torch.randn(EXPERTS, 64, 32), torch.randn(EXPERTS, 32, 32))
    stacks = ExpertWeights.quantize(dense).mxfp8_experts
    assert stacks is not None
    held = (expert_map.on(CPU) >= 0).nonzero().squeeze(1)
    parts = [part.view(torch.uint8)[held] for part in (stacks.w13.values, stacks.w2.values)]
    codes = [part.view(torch.float8_e4m3fn) for part in parts]
    weights = ExpertWeights.mxfp8(codes[0], stacks.w13.scales[held], codes[1], stacks.w2.scales[held])
    built = nn.ModuleDict(
        {
            "router": nn.Linear(32, EXPERTS, bias=False),
            "norm": nn.BatchNorm1d(3),  # a float32 and an int64 buffer of no dimension
            "embed": nn.Embedding(4, 32),
            "head": nn.Linear(32, 4, bias=False),
            "experts": EPExperts(weights, expert_map, SwiGLUOAI(), EPGroup.single()),
        }
    )
    built["head"].weight = built["embed"].weight
    return built


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().clone().reshape(-1).view(torch.uint8)
        for name, tensor in (*module.named_parameters(remove_duplicate=False), *module.named_buffers())
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_checkpoint(model(ExpertMap.all_local(EXPERTS)), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def rewrite(path: Path, **tensors: torch.Tensor | None) -> None:
    held = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path)


def same(found: nn.Module, expected: nn.Module) -> None:
    wanted = bits(expected)
    assert bits(found).keys() == wanted.keys()
    for name, tensor in bits(found).items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_bit_arrives_and_what_was_tied_stays_tied(file: Path, device: str) -> None:
    target = model(SHARE, seed=1).to(device)
    target["head"].weight = target["embed"].weight  # .to("meta") unties
    load_sharded(target, file, SHARDED, CPU)
    same(target, model(SHARE))
    assert target["head"].weight is target["embed"].weight


def test_e8m0_scales_are_reinterpreted_both_ways(file: Path) -> None:
    """A cast makes bytes of 0 of them."""
    whole = load_file(file)
    rewrite(
        file,
        experts__gate_up_proj_scale=whole["experts.gate_up_proj_scale"].view(torch.float8_e8m0fnu),
        experts__down_proj_scale=whole["experts.down_proj_scale"].view(torch.float8_e8m0fnu),
    )
    target = model(SHARE, seed=1)
    load_sharded(target, file, SHARDED, CPU)
    same(target, model(SHARE))
    rewrite(file, experts__down_proj_scale=whole["experts.down_proj_scale"])
    scale = target["experts"].gate_up_proj_scale
    target["experts"].gate_up_proj_scale = nn.Parameter(scale.view(torch.float8_e8m0fnu), requires_grad=False)
    load_sharded(target, file, SHARDED, CPU)
    same(target, model(SHARE))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("experts.gate_up_proj", torch.float32),  # numbers into codes
        ("experts.gate_up_proj", torch.bfloat16),
        ("experts.gate_up_proj", torch.float8_e4m3fnuz),  # half the value
        ("experts.gate_up_proj", torch.float8_e5m2),
        ("experts.gate_up_proj", torch.uint8),  # of which FP8?
        ("experts.gate_up_proj", torch.int8),
        ("experts.down_proj_scale", torch.int8),
        ("experts.down_proj_scale", torch.float32),
        ("experts.down_proj_scale", torch.float8_e4m3fn),
        ("router.weight", torch.float8_e4m3fn),  # codes without their scales
        ("router.weight", torch.bfloat16),
        ("router.weight", torch.float64),
        ("router.weight", torch.int32),
        ("norm.num_batches_tracked", torch.int32),
    ],
)
def test_other_dtypes_are_refused_by_name_and_change_nothing(file: Path, name: str, dtype: torch.dtype) -> None:
    whole = load_file(file)[name]
    size = whole.element_size() == dtype.itemsize
    rewrite(file, **{name.replace(".", "__"): whole.view(dtype) if size else whole.float().to(dtype)})
    target = model(SHARE, seed=1)
    before = bits(target)
    with pytest.raises(DtypeError, match=rf"{name} has dtype {dtype}"):
        load_sharded(target, file, SHARDED, CPU)
    assert all(torch.equal(tensor, before[key]) for key, tensor in bits(target).items())


def test_a_state_dict_is_reinterpreted_or_refused_too() -> None:
    whole, target = model(ExpertMap.all_local(EXPERTS)), model(ExpertMap.all_local(EXPERTS), seed=1)
    state = whole.state_dict()
    state["experts.down_proj_scale"] = state["experts.down_proj_scale"].view(torch.float8_e8m0fnu)
    target.load_state_dict(state)
    same(target, whole)
    for name, dtype in (("gate_up_proj", torch.float32), ("down_proj_scale", torch.float32)):
        with pytest.raises(DtypeError, match=rf"experts\.{name} has dtype torch\.float32"):
            target.load_state_dict(state | {f"experts.{name}": state[f"experts.{name}"].to(dtype)})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"router__weight": None}, CheckpointError, r"lacks router\.weight"),
        ({"router__bias": torch.zeros(5)}, CheckpointError, r"has router\.bias too many"),
        ({"head__weight": torch.zeros(4, 32)}, CheckpointError, r"embed\.weight, head\.weight apart"),
        ({"router__weight": torch.zeros(5, 31)}, ShapeError, r"router\.weight has shape \(5, 31\)"),
        ({"router__weight": torch.zeros(())}, ShapeError, r"router\.weight has shape \(\)"),
        ({"experts__down_proj_scale": torch.zeros(6, 32, 1, dtype=torch.uint8)}, ShapeError, r"\(6, 32, 1\)"),
        ({"experts__down_proj_scale": torch.zeros(3, 32, 1, dtype=torch.uint8)}, ShapeError, r"\(3, 32, 1\)"),
        ({"experts__down_proj_scale": torch.zeros((), dtype=torch.uint8)}, ShapeError, "down_proj_scale"),
    ],
)
def test_another_models_file_is_refused(
    file: Path, changes: dict[str, Any], error: type[EpfuseError], match: str
) -> None:
    rewrite(file, **changes)
    with pytest.raises(error, match=match):
        load_sharded(model(SHARE), file, SHARDED, CPU)


def test_a_map_of_other_sizes_and_unknown_names_are_refused(file: Path) -> None:
    with pytest.raises(ShapeError, match="L=3"):
        load_sharded(model(SHARE), file, dict.fromkeys(SHARDED, ExpertMap.contiguous(EXPERTS, 2, 0)), CPU)
    with pytest.raises(CheckpointError, match=r"sharded names experts\.bias"):
        load_sharded(model(SHARE), file, {**SHARDED, "experts.bias": SHARE}, CPU)


def test_a_rank_past_the_last_expert_loads_none(file: Path) -> None:
    nothing = ExpertMap.contiguous(EXPERTS, 7, 6)
    target = model(nothing)
    load_sharded(target, file, dict.fromkeys(SHARDED, nothing), CPU)
    assert target["experts"].gate_up_proj.shape == (0, 64, 32)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_text("{}" * 20)
    (tmp_path / "empty").write_bytes(b"")
    for name in ("fifo", "text", "empty", "absent", "."):
        with pytest.raises(CheckpointError, match=r"can't be read|is not a file"):
            load_sharded(model(SHARE), tmp_path / name, SHARDED, CPU)


def test_what_can_not_be_saved_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model(ExpertMap.all_local(EXPERTS))
    with pytest.raises(CheckpointError, match="meta device"):
        save_checkpoint(model(SHARE).to("meta"), tmp_path / "x")
    with pytest.raises(CheckpointError, match="can't be written"):
        save_checkpoint(whole, tmp_path / "absent" / "x")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="not a regular file"):
        save_checkpoint(whole, tmp_path / "fifo")
    monkeypatch.setattr("epfuse.weights.experts.target_of", lambda device: Target.GFX942)
    whole["experts"].prepare()
    for what in (
        lambda: save_checkpoint(whole, tmp_path / "x"),
        lambda: load_sharded(whole, tmp_path / "x", {}, CPU),
        whole.state_dict,
        lambda: whole.load_state_dict(model(ExpertMap.all_local(EXPERTS)).state_dict()),
        lambda: whole.to(torch.float64),
    ):
        with pytest.raises(ConfigError, match=r"after prepare\(\): their memory holds mxfp8_fnuz"):
            what()


def test_views_of_one_memory_are_saved_apart(tmp_path: Path) -> None:
    memory = torch.arange(6.0)
    module = nn.Module()
    module.register_buffer("whole", memory)
    module.register_buffer("part", memory[:3])
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    save_checkpoint(module, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(load_file(tmp_path / "target")["part"], memory[:3])


def test_tensors_that_are_split_or_packed_are_refused(file: Path) -> None:
    class Packed(torch.Tensor):
        pass

    target = model(SHARE)
    target["router"].weight = nn.Parameter(torch.zeros(5, 32).as_subclass(Packed))
    with pytest.raises(LayoutError, match=r"router\.weight is a Packed"):
        load_sharded(target, file, SHARDED, CPU)
    target["router"].weight = nn.Parameter(torch.zeros(5, 32).to_sparse())
    with pytest.raises(LayoutError, match=r"router\.weight has layout torch\.sparse_coo"):
        save_checkpoint(target, file)


def test_same_bits_are_a_view_and_others_an_error() -> None:
    scales = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    numbers = reinterpret("s", scales, torch.float8_e8m0fnu)
    assert numbers.data_ptr() == scales.data_ptr()
    assert float(numbers[127]) == 1.0
    assert reinterpret("s", numbers, torch.float8_e8m0fnu) is numbers
    with pytest.raises(DtypeError, match=r"s has dtype torch\.float32; torch\.bfloat16 is needed.*\.to\(float32\)"):
        reinterpret("s", torch.zeros(1), torch.bfloat16)


DTYPES = [getattr(torch, name) for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e8m0fnu", "float8_e5m2")]
DTYPES += [
    torch.uint8,
    torch.int8,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.bool,
]


def mutations(whole: dict[str, torch.Tensor], generator: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
    def draw(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    while True:
        held = dict(whole)
        for _ in range(1 + draw(2)):
            name = sorted(held)[draw(len(held))]
            tensor, dtype = held[name], DTYPES[draw(len(DTYPES))]
            kind = draw(6)
            if kind == 0:
                del held[name]
            elif kind == 1:
                held[name + "_scale"] = tensor.clone()
            elif kind == 2:
                held[name] = tensor.float().to(dtype)
            elif kind == 3 and tensor.element_size() == dtype.itemsize:
                held[name] = tensor.view(dtype)
            elif kind == 4:
                held[name] = torch.zeros([draw(7) for _ in range(draw(4))], dtype=tensor.dtype)
            else:
                held[name] = (
                    tensor.reshape(-1).clone() if draw(2) else tensor.mT.contiguous() if tensor.dim() > 1 else tensor
                )
        yield held


def test_fuzz_300_files_load_bit_for_bit_or_are_refused(file: Path) -> None:
    whole = load_file(file)
    expected = bits(model(SHARE))
    share = model(SHARE, seed=1)
    before = bits(share)
    loaded = 0
    stream = mutations(whole, torch.Generator().manual_seed(0))
    for _ in range(300):
        held = next(stream)
        save_file(held, file)
        target = copy.deepcopy(share)
        try:
            load_sharded(target, file, SHARDED, CPU)
        except EpfuseError:
            assert all(torch.equal(tensor, before[name]) for name, tensor in bits(target).items())
            continue
        loaded += 1
        rewritten = {name for name, tensor in held.items() if tensor.shape == whole[name].shape}
        assert rewritten == whole.keys()
        for name, tensor in bits(target).items():
            source = "embed.weight" if name == "head.weight" else name
            raw = held[source].reshape(-1).view(torch.uint8)
            if source in SHARDED:
                raw = raw.view(EXPERTS, -1)[3:].reshape(-1)
            assert torch.equal(tensor, raw), name
            if torch.equal(held[source].reshape(-1).view(torch.uint8), whole[source].reshape(-1).view(torch.uint8)):
                assert torch.equal(tensor, expected[name]), name
    assert loaded >= 5


def test_fuzz_300_damaged_files_are_refused_or_loaded(file: Path) -> None:
    """Bytes of the header and the length of the file; flipped bits of the data can't be told from other numbers."""
    good = file.read_bytes()
    generator = torch.Generator().manual_seed(1)
    share = model(SHARE)
    header = 8 + int.from_bytes(good[:8], "little")
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(int(torch.randint(1, 4, (1,), generator=generator))):
            at = int(torch.randint(header, (1,), generator=generator))
            damaged[at] = int(torch.randint(256, (1,), generator=generator))
        cut = int(torch.randint(len(good), (1,), generator=generator))
        file.write_bytes(bytes(damaged[:cut]) if cut % 3 == 0 else bytes(damaged))
        with contextlib.suppress(EpfuseError):
            load_sharded(copy.deepcopy(share), file, SHARDED, CPU)
