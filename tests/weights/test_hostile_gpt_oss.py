"""Folders in gpt-oss' layouts that nobody has checked: the right numbers or an error of ours, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")

from epfuse import ExpertWeights
from epfuse.errors import EpfuseError
from tests.weights.hostile import EXPERTS, HIDDEN, LOCAL, WIDTH, fuzz, load, write

MODULE = "model.layers.0.mlp.experts"
BF16: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
}
MXFP4 = BF16 | {"quantization_config": {"quant_method": "mxfp4"}}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def biases(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        f"{MODULE}.gate_up_proj_bias": torch.randn(EXPERTS, 2 * WIDTH, generator=generator).bfloat16(),
        f"{MODULE}.down_proj_bias": torch.randn(EXPERTS, HIDDEN, generator=generator).bfloat16(),
    }


def dense() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{MODULE}.gate_up_proj": torch.randn(EXPERTS, HIDDEN, 2 * WIDTH, generator=generator).bfloat16(),
        f"{MODULE}.down_proj": torch.randn(EXPERTS, WIDTH, HIDDEN, generator=generator).bfloat16(),
        **biases(generator),
    }


def mxfp4() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = biases(generator)
    for name, rows, columns in (("gate_up_proj", 2 * WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH)):
        size = (EXPERTS, rows, columns // 32)
        found[f"{MODULE}.{name}_blocks"] = torch.randint(0, 256, (*size, 16), generator=generator, dtype=torch.uint8)
        found[f"{MODULE}.{name}_scales"] = torch.randint(100, 150, size, generator=generator, dtype=torch.uint8)
    return found


def gate_first(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat((rows[0::2], rows[1::2]))


def check_biases(weights: ExpertWeights, held: Mapping[str, torch.Tensor]) -> None:
    assert [name for name, _ in weights.biases] == ["gate_up_bias", "down_bias"]
    for slot, expert in enumerate(LOCAL):
        for bias, name in zip((bias for _, bias in weights.biases), ("gate_up_proj", "down_proj"), strict=True):
            whole = held[f"{MODULE}.{name}_bias"][expert].float()
            expected = gate_first(whole) if name == "gate_up_proj" else whole
            torch.testing.assert_close(bias[slot], expected, rtol=0, atol=0, equal_nan=True)


def check_dense(weights: ExpertWeights, held: Mapping[str, torch.Tensor]) -> None:
    check_biases(weights, held)
    (experts,) = weights.formats
    for slot, expert in enumerate(LOCAL):
        for stack, name in ((experts.w13, "gate_up_proj"), (experts.w2, "down_proj")):
            whole = held[f"{MODULE}.{name}"][expert].mT
            expected = gate_first(whole) if name == "gate_up_proj" else whole
            torch.testing.assert_close(stack[slot], expected, rtol=0, atol=0, equal_nan=True)


def check_mxfp4(weights: ExpertWeights, held: Mapping[str, torch.Tensor]) -> None:
    """Codes are the two halves of a byte, the lower one first; scales are the files' bytes."""
    check_biases(weights, held)
    (experts,) = weights.formats
    for slot, expert in enumerate(LOCAL):
        for stack, name in ((experts.w13, "gate_up_proj"), (experts.w2, "down_proj")):
            blocks = held[f"{MODULE}.{name}_blocks"][expert].long()
            numbers = E2M1[torch.stack((blocks % 16, blocks // 16), -1)].flatten(1)
            scales = held[f"{MODULE}.{name}_scales"][expert].view(torch.uint8)
            if name == "gate_up_proj":
                numbers, scales = gate_first(numbers), gate_first(scales)
            assert torch.equal(stack.values[slot].float(), numbers)
            assert torch.equal(stack.scales[slot], scales)


LAYOUTS: dict[str, tuple[Callable[[], dict[str, torch.Tensor]], Any, Any]] = {
    "bf16": (dense, BF16, check_dense),
    "mxfp4": (mxfp4, MXFP4, check_mxfp4),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_folder_itself_is_good(folder: Path, layout: str) -> None:
    tensors, config, check = LAYOUTS[layout]
    write(folder, tensors(), config)
    check(load(folder), tensors())


@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fuzz_no_foreign_exception_and_no_other_number(folder: Path, layout: str, part: int) -> None:
    tensors, config, check = LAYOUTS[layout]
    write(folder, tensors(), config)
    fuzz(folder, config, check, part)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda held: held.pop(f"{MODULE}.{name}")


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], Any]:
    key = f"{MODULE}.{name}"
    return lambda held: held.update({key: change(held[key]).contiguous()})


HOSTILE = {
    "no bias": ("bf16", without("gate_up_proj_bias"), "lacks the bias of all experts' gate and up"),
    "no bias of down": ("mxfp4", without("down_proj_bias"), "lacks the bias of all experts' down"),
    "half a bias": ("bf16", changed("gate_up_proj_bias", lambda b: b[:, ::2]), r"has shape \(4, 32\)"),
    "a bias for all": ("mxfp4", changed("down_proj_bias", lambda b: b[0]), r"has shape \(64,\)"),
    "a bias in bytes": ("mxfp4", changed("down_proj_bias", lambda b: b.view(torch.uint8)[:, ::2]), "is in U8"),
    "biases in two dtypes": ("bf16", changed("down_proj_bias", lambda b: b.float()), "both must be in one"),
    "a matrix cut": ("bf16", changed("down_proj", lambda w: w[:, :16]), r"has shape \(4, 16, 64\)"),
    "no scales": ("mxfp4", without("down_proj_scales"), "lacks the scale of all experts' down"),
    "flat blocks": ("mxfp4", changed("down_proj_blocks", lambda b: b.flatten(2)), r"has shape \(4, 64, 16\)"),
    "signed blocks": ("mxfp4", changed("down_proj_blocks", lambda b: b.view(torch.int8)), "is in I8"),
    "float scales": ("mxfp4", changed("down_proj_scales", lambda s: s.float()), "is in F32"),
    "both numbers": (
        "mxfp4",
        lambda held: held.update({f"{MODULE}.down_proj": torch.ones(EXPERTS, WIDTH, HIDDEN)}),
        "the same part of one matrix",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders_are_refused_by_name(folder: Path, case: str) -> None:
    layout, edit, words = HOSTILE[case]
    tensors, config, _ = LAYOUTS[layout]
    held = tensors()
    edit(held)
    write(folder, held, config)
    with pytest.raises(EpfuseError, match=words):
        load(folder)


def test_biases_that_the_family_does_not_have_are_refused(folder: Path) -> None:
    """Without them the result would be another one."""
    held = dense()
    held[f"{MODULE}.gate_up_proj"] = held[f"{MODULE}.gate_up_proj"].mT.contiguous()
    held[f"{MODULE}.down_proj"] = held[f"{MODULE}.down_proj"].mT.contiguous()
    write(folder, held, BF16 | {"model_type": "mixtral"})
    with pytest.raises(EpfuseError, match="which E=4 experts in bf16 don't have"):
        load(folder)


def test_blocks_of_128_rows_that_gate_and_up_share_are_refused(tmp_path: Path) -> None:
    size = {"hidden_size": 128, "intermediate_size": 128}
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    tensors = {f"{MODULE}.gate_up_proj_bias": torch.zeros(EXPERTS, 256).bfloat16()}
    tensors[f"{MODULE}.down_proj_bias"] = torch.zeros(EXPERTS, 128).bfloat16()
    for name, rows in (("gate_up_proj", 256), ("down_proj", 128)):
        tensors[f"{MODULE}.{name}"] = torch.ones(EXPERTS, rows, 128).to(torch.float8_e4m3fn)
        tensors[f"{MODULE}.{name}_scale_inv"] = torch.ones(EXPERTS, rows // 128, 1)
    write(tmp_path, tensors, BF16 | size | fp8)
    with pytest.raises(EpfuseError, match="gate and up rows share it"):
        load(tmp_path)
