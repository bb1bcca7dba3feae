"""Folders that nobody has checked: the right numbers or an error of ours that names the file, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from epfuse import ExpertMap, ExpertWeights
from epfuse.errors import EpfuseError, ShapeError
from epfuse.parallel.placement import ExpertPlacement
from epfuse.weights.checkpoint import ExpertCheckpoint
from epfuse.weights.projections import expert_matrix
from epfuse.weights.tensor_file import TensorFile
from tests.mutations import mutated_bytes, mutated_values
from tests.weights.hostile import (
    CASES,
    EXPERTS,
    HIDDEN,
    INDEX,
    SHARDS,
    SHARE,
    WIDTH,
    fuzz,
    header_of,
    load,
    with_header,
    write,
)

CONFIG = {
    "model_type": "minimax_m3_vl_text",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_layer_freq": [1],
    "quantization_config": {"quant_method": "mxfp8"},
}
MODULE = "model.layers.0.block_sparse_moe.experts"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dense = ExpertWeights.dense(
        torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator),
        torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator),
    )
    stacks = ExpertWeights.quantize(dense).mxfp8_experts
    assert stacks is not None
    found = {"model.norm.weight": torch.ones(HIDDEN)}
    for expert in range(EXPERTS):
        for name, stack, rows in (
            ("w1", stacks.w13, slice(0, WIDTH)),
            ("w3", stacks.w13, slice(WIDTH, None)),
            ("w2", stacks.w2, slice(None)),
        ):
            found[f"{MODULE}.{expert}.{name}.weight"] = stack.values[expert][rows].clone()
            found[f"{MODULE}.{expert}.{name}.weight_scale_inv"] = stack.scales[expert][rows].clone()
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    write(made, tensors(), CONFIG)
    return made


def check(weights: ExpertWeights, held: Mapping[str, torch.Tensor]) -> None:
    """Every local expert's codes and scale bytes are those of the files."""
    (experts,) = weights.formats
    for slot, expert in enumerate((2, 3)):
        for stack, names in ((experts.w13, ("w1", "w3")), (experts.w2, ("w2",))):
            for part, end in ((stack.values, "weight"), (stack.scales, "weight_scale_inv")):
                whole = [held[f"{MODULE}.{expert}.{name}.{end}"].view(torch.uint8) for name in names]
                assert torch.equal(part[slot].view(torch.uint8), torch.cat(whole))


def test_the_folder_itself_is_good(folder: Path) -> None:
    check(load(folder), tensors())


@pytest.mark.parametrize("end", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_are_reinterpreted_under_both_names(folder: Path, end: str, dtype: torch.dtype) -> None:
    """A cast of float8_e8m0fnu to uint8 makes 0 of every scale below 1."""
    held = {
        name.replace("weight_scale_inv", end): tensor.view(dtype) if tensor.dtype == torch.uint8 else tensor
        for name, tensor in tensors().items()
    }
    write(folder, held, CONFIG)
    check(load(folder), tensors())


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        header, data = header_of(folder / SHARDS[0])
        with_header(folder / SHARDS[0], change(header) or header, data)

    return edit


def edit_index(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        held = tensors()
        change(held)
        write(folder, held, CONFIG | config)

    return edit


def first(header: dict[str, Any]) -> Any:
    return header[f"{MODULE}.0.w1.weight"]


def overlap(header: dict[str, Any]) -> None:
    header["one more"] = dict(first(header))


def twice(header: dict[str, Any]) -> bytes:
    text = json.dumps(header)
    return text.replace("{", '{"a": 1, "a": 2, ', 1).encode()


def nothing(held: dict[str, torch.Tensor]) -> None:
    pass


def lead_out(folder: Path) -> None:
    shutil.move(folder / SHARDS[0], folder.parent / "elsewhere.safetensors")
    (folder / SHARDS[0]).symlink_to(folder.parent / "elsewhere.safetensors")


def as_pickle(folder: Path) -> None:
    for name in (*SHARDS, INDEX):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


SCALE = f"{MODULE}.1.w2.weight_scale_inv"
WEIGHT = f"{MODULE}.1.w2.weight"
HOSTILE = {
    "overlap": (edit_header(overlap), "overlaps what comes before"),
    "duplicate names": (edit_header(twice), "has the key 'a' twice"),
    "absurd size": (edit_header(lambda h: first(h).update(shape=[2**62, 2**62])), "would take"),
    "negative": (edit_header(lambda h: first(h).update(data_offsets=[-8, 0])), "all counts"),
    "true for 1": (edit_header(lambda h: first(h).update(shape=[True, 2048])), "all counts"),
    "unknown dtype": (edit_header(lambda h: first(h).update(dtype="F3")), "which the format does not have"),
    "metadata": (edit_header(lambda h: h.update(__metadata__={"a": 1})), "__metadata__ must hold strings"),
    "no object": (edit_header(lambda h: b" {}"), "does not begin with"),
    "cut short": (lambda f: os.truncate(f / SHARDS[1], (f / SHARDS[1]).stat().st_size - 1), "cut short"),
    "empty": (lambda f: (f / SHARDS[1]).write_bytes(b""), "cut short or none"),
    "a long header": (lambda f: (f / SHARDS[1]).write_bytes(b"\xff" * 16), "cut short or none"),
    "missing shard": (lambda f: (f / SHARDS[1]).unlink(), "is missing, and model.safetensors.index.json names it"),
    "FIFO": (lambda f: ((f / SHARDS[1]).unlink(), os.mkfifo(f / SHARDS[1])), "no regular file"),
    "link out": (lead_out, "a link that leads out of the folder"),
    "link to itself": (lambda f: ((f / SHARDS[0]).unlink(), (f / SHARDS[0]).symlink_to(SHARDS[0])), "Too many levels"),
    "absolute shard": (edit_index(lambda m: m.update({WEIGHT: f"{os.sep}x.safetensors"})), "names the shard '/x"),
    "shard above": (edit_index(lambda m: m.update({WEIGHT: "../x.safetensors"})), "names the shard '../x"),
    "another kind of shard": (edit_index(lambda m: m.update({WEIGHT: "x.bin"})), "names the shard 'x.bin'"),
    "a shard without it": (edit_index(lambda m: m.update({"model.y": SHARDS[0]})), "lacks 'model.y'"),
    "a name in another shard": (edit_index(lambda m: m.pop(WEIGHT)), "stands in .*, and the index does not put it"),
    "two models": (lambda f: save_file({"a": torch.ones(1)}, f / "model.safetensors"), "which does not name it"),
    "pickle": (as_pickle, "a pickle is never read"),
    "no experts": (
        lambda f: write(f, {"a": torch.ones(1), "b": torch.ones(1)}, CONFIG),
        "must have the experts of layer 0 once",
    ),
    "an expert less": (edit_tensors(lambda t: t.pop(WEIGHT)), "lacks the weight of expert 1's down"),
    "an expert more": (edit_tensors(lambda t: t.update({WEIGHT.replace(".1.", ".4."): t[WEIGHT].clone()})), "expert 4"),
    "more experts than there is memory": (
        edit_tensors(nothing, num_local_experts=2**31 - 1),
        "lacks the .* expert 4's",
    ),
    "experts in a dense layer": (
        edit_tensors(
            lambda t: t.update({n.replace("layers.0", "layers.1"): v.clone() for n, v in tensors().items()}),
            num_hidden_layers=2,
            moe_layer_freq=[1, 0],
        ),
        "has model.layers.1.block_sparse_moe.experts, and its config says that layer 1 has no experts",
    ),
    "a scale twice": (edit_tensors(lambda t: t.update({WEIGHT + "_scale": t[SCALE].clone()})), "the same part of one"),
    "both layouts": (
        edit_tensors(lambda t: t.update({f"{MODULE}.gate_up_proj": torch.ones(1)})),
        "stacks of all experts and tensors of single ones",
    ),
    "two places": (
        edit_tensors(lambda t: t.update({WEIGHT.replace("block_sparse_moe", "mlp"): t[WEIGHT].clone()})),
        "it has model.layers.0.block_sparse_moe.experts and model.layers.0.mlp.experts",
    ),
    "NVFP4's second scale": (
        edit_tensors(lambda t: t.update({f"{MODULE}.1.w2.weight_scale_2": torch.ones(1)})),
        "weight_scale_2",
    ),
    "an adapter": (edit_tensors(lambda t: t.update({f"{MODULE}.1.w2.lora_A": torch.ones(1)})), "which is not read"),
    "codes as bytes": (edit_tensors(lambda t: t.update({WEIGHT: t[WEIGHT].view(torch.uint8)})), "is in U8"),
    "E5M2": (edit_tensors(lambda t: t.update({WEIGHT: t[WEIGHT].view(torch.float8_e5m2)})), "is in F8_E5M2"),
    "FNUZ": (edit_tensors(lambda t: t.update({WEIGHT: t[WEIGHT].view(torch.float8_e4m3fnuz)})), "is in F8_E4M3FNUZ"),
    "float scales": (edit_tensors(lambda t: t.update({SCALE: t[SCALE].float()})), "is in F32"),
    "signed scales": (edit_tensors(lambda t: t.update({SCALE: t[SCALE].view(torch.int8)})), "is in I8"),
    "mixed scales": (
        edit_tensors(lambda t: t.update({SCALE: t[SCALE].view(torch.float8_e8m0fnu)})),
        "both must be in one",
    ),
    "another shape": (edit_tensors(lambda t: t.update({WEIGHT: t[WEIGHT].mT.contiguous()})), r"has shape \(32, 64\)"),
    "BF16 said": (edit_tensors(nothing, quantization_config=None), "the config says bf16"),
    "MXFP4 said": (edit_tensors(nothing, quantization_config={"quant_method": "mxfp4"}), "is in F8_E4M3|has shape"),
    "blocks of 128 said": (
        edit_tensors(nothing, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
        "multiples of 128",
    ),
    "NVFP4 said": (
        edit_tensors(nothing, quantization_config={"quant_method": "mxfp8", "moe_quant_algo": "NVFP4"}),
        "moe_quant_algo is 'NVFP4'",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders_are_refused_by_name(folder: Path, case: str) -> None:
    edit, words = HOSTILE[case]
    edit(folder)
    with pytest.raises(EpfuseError, match=words):
        load(folder)


def test_the_cache_of_the_hub_is_read(folder: Path) -> None:
    """``snapshots/REVISION`` has links to ``blobs``."""
    snapshot, blobs = folder.parent / "snapshots" / "abc", folder.parent / "blobs"
    snapshot.parent.mkdir()
    blobs.mkdir()
    folder.rename(snapshot)
    for number, shard in enumerate(SHARDS):
        (snapshot / shard).rename(blobs / f"{number}")
        (snapshot / shard).symlink_to(Path("../../blobs") / f"{number}")
    check(load(snapshot), tensors())


@pytest.mark.parametrize("change", ["shorter", "another"])
def test_a_file_that_changes_meanwhile_is_an_error_and_no_signal(folder: Path, change: str) -> None:
    checkpoint = ExpertCheckpoint(folder)
    shard = folder / SHARDS[1]
    if change == "shorter":
        os.truncate(shard, 2000)
    else:
        shard.write_bytes(shard.read_bytes())
        os.utime(shard, ns=(0, 0))
    with pytest.raises(EpfuseError, match="was changed while it was being read"):
        list(checkpoint.load(SHARE))
    file = TensorFile(folder / SHARDS[0])
    with file.open():
        os.truncate(folder / SHARDS[0], 2000)
        with pytest.raises(EpfuseError, match="cut short while it was read"):
            file.tensors[f"{MODULE}.1.w1.weight"].read()


@pytest.mark.parametrize("part", range(4))
def test_fuzz_no_foreign_exception_and_no_other_number(folder: Path, part: int) -> None:
    fuzz(folder, CONFIG, check, part)


def test_fuzz_what_safetensors_refuses_is_refused(folder: Path) -> None:
    """Duplicate names are the one thing that we refuse and it does not; its reader is the oracle of the rest."""
    path = folder / SHARDS[0]
    good = path.read_bytes()
    header, data = header_of(path)
    accepted = 0
    for number, changed in enumerate([*mutated_values(header, CASES, 9), *mutated_bytes(good, CASES, 9)]):
        if number < CASES:
            with_header(path, changed, data)
        else:
            path.write_bytes(changed)
        try:
            file = TensorFile(path)
        except EpfuseError:
            continue
        accepted += 1
        try:
            with safe_open(path, "pt") as theirs:
                assert set(theirs.keys()) == set(file.tensors)
                for name, tensor in file.tensors.items():
                    rows = theirs.get_slice(name)
                    assert (tuple(rows.get_shape()), rows.get_dtype()) == (tensor.shape, tensor.kind)
        except SafetensorError as error:
            pytest.fail(f"{changed[:300]!r}: {error}")
    assert accepted > 20


def of_stacks(folder: Path) -> Path:
    """The same sizes in BF16, the matrices of all experts in one tensor, and another tensor behind them."""
    for name in (*SHARDS, INDEX):
        (folder / name).unlink()
    module, generator = "model.layers.0.mlp.experts", torch.Generator().manual_seed(0)
    sizes = {"down_proj": (EXPERTS, HIDDEN, WIDTH), "gate_up_proj": (EXPERTS, 2 * WIDTH, HIDDEN)}
    held = {f"{module}.{name}": torch.randn(size, generator=generator).bfloat16() for name, size in sizes.items()}
    save_file(held | {"z": torch.full((1 << 16,), 7.0)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": None}))
    return folder


@pytest.mark.parametrize("stacks", [False, True])
@pytest.mark.parametrize("experts", [EXPERTS // 2, 2 * EXPERTS])
def test_a_map_of_other_experts_is_refused_for_one_layer_too(folder: Path, experts: int, stacks: bool) -> None:
    """A row past the last one of a stack is another tensor's bytes."""
    checkpoint = ExpertCheckpoint(of_stacks(folder) if stacks else folder)
    expert_map = ExpertMap.contiguous(experts, 1, 0)
    with pytest.raises(ShapeError, match=f"is of E={experts} experts; the model has {EXPERTS}"):
        checkpoint.load_layer(0, expert_map)
    with pytest.raises(ShapeError, match=f"is of E={experts} experts; the model has {EXPERTS}"):
        checkpoint.bytes_of(expert_map)
    share = ExpertPlacement.contiguous(experts, 1).share(0)  # whoever forgot the last experts, too
    with pytest.raises(ShapeError, match=f"the expert share is of E={experts} experts; the model has {EXPERTS}"):
        checkpoint.load_layer(0, share)


def test_copies_of_experts_are_loaded(folder: Path) -> None:
    """A placement with copies has a map of physical ids; the checkpoint knows the experts alone."""
    placement = ExpertPlacement(((0, 1, 0), (3, 2, 0)))
    checkpoint = ExpertCheckpoint(folder)
    with pytest.raises(ShapeError, match=r"E=6 experts; the model has 4 \(where experts have copies"):
        checkpoint.load_layer(0, placement.expert_map(1))
    (whole,) = checkpoint.load_layer(0, ExpertMap.all_local(EXPERTS)).formats
    for rank, own in enumerate(placement.held):
        (experts,) = checkpoint.load_layer(0, placement.share(rank)).formats
        for slot, expert in enumerate(own):
            for (_, ours), (_, theirs) in zip(experts.tensors(), whole.tensors(), strict=True):
                assert torch.equal(ours[slot].view(torch.uint8), theirs[expert].view(torch.uint8))
        assert 2 * checkpoint.bytes_of(placement.share(rank)) == 3 * checkpoint.bytes_of(SHARE)


def test_an_expert_keeps_its_number_under_any_map(folder: Path) -> None:
    whole = tensors()
    for order in ([-1, 1, -1, 0], [2, 0, 1, -1], [-1] * 4):
        ((_, weights),) = ExpertCheckpoint(folder).load(ExpertMap(torch.tensor(order)))
        for expert, slot in enumerate(order):
            if slot >= 0:
                down = expert_matrix(weights.formats[0].w2, slot, torch.float32)
                assert down.shape == (HIDDEN, WIDTH)
                codes = whole[f"{MODULE}.{expert}.w2.weight"].float()
                assert torch.equal(down == 0, codes == 0)
