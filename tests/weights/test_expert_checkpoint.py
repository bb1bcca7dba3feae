"""A rank's experts out of a Hugging Face folder: the numbers that transformers' own from_pretrained finds there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from epfuse import ExpertMap
from epfuse.demo.checkpoint import RECIPES, make_checkpoint
from epfuse.demo.settings import ModelSize
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.weights.checkpoint import ExpertCheckpoint
from epfuse.weights.checkpoint_format import Checkpoint
from epfuse.weights.projections import expert_matrix

EXPERTS = 6
MADE = [(family, form) for family, recipe in RECIPES.items() for form in recipe.formats]


def size_of(family: str) -> ModelSize:
    dense = 0 if family in ("mixtral", "gpt_oss") else 1
    return ModelSize(256, 128, 256, dense_layers=dense, moe_layers=1, experts=EXPERTS, top_k=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(family, format) -> a folder, made once."""
    made: dict[tuple[str, Checkpoint], Path] = {}

    def folder(family: str, form: Checkpoint) -> Path:
        if (family, form) not in made:
            made[family, form] = tmp_path_factory.mktemp(f"{family}-") / "checkpoint"
            make_checkpoint(made[family, form], family, form, size_of(family), seed=3, shard_bytes=1 << 20)
        return made[family, form]

    return folder


def transformers_experts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> BF16 gate_up_proj ``[E, 2I, H]``, gate rows first, and down_proj ``[E, H, I]``, by from_pretrained."""
    config = json.loads((folder / "config.json").read_text())
    quantizer = transformers.quantizers.quantizer_finegrained_fp8
    # it asks for accelerate before it dequantises on a CPU, and does not use it for that
    monkeypatch.setattr(quantizer, "is_accelerate_available", lambda: True)
    if folder.parent.name.startswith(
        "minimax_m3_vl_text"
    ):  # stacks, which it does not dequantise: FP8Experts take them
        monkeypatch.setattr(quantizer.FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    vision = "vision_config" in config
    auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    more = {}
    if config.get("quantization_config", {}).get("quant_method") == "mxfp4":
        more["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    model, report = auto.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **more)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    found = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()
            if gate_up.dtype == torch.float8_e4m3fn:
                gate_up = MXFP8(gate_up, module.gate_up_proj_scale_inv.detach()).dequantize(torch.bfloat16)
                down = MXFP8(down, module.down_proj_scale_inv.detach()).dequantize(torch.bfloat16)
            if getattr(module, "is_transposed", False):
                gate_up, down = gate_up.mT, down.mT
            if not getattr(module, "is_concatenated", True):
                gate_up = torch.cat((gate_up[:, 0::2], gate_up[:, 1::2]), 1)
            found[int(name.split("layers.")[1].split(".")[0])] = gate_up, down
    return found


@pytest.mark.parametrize(("family", "form"), [pair for pair in MADE if pair[0] != "gpt_oss"])
def test_each_rank_has_the_numbers_that_transformers_has(
    folders: Any, family: str, form: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders(family, form)
    expected = transformers_experts(folder, monkeypatch)
    checkpoint = ExpertCheckpoint(folder)
    assert list(checkpoint.layers) == list(expected)
    read: list[int] = []
    for expert_map in (
        *(ExpertMap.contiguous(EXPERTS, 4, rank) for rank in range(4)),
        ExpertMap(torch.tensor([2, -1, 0, -1, 1, -1])),
    ):
        slots = expert_map.on(torch.device("cpu")).tolist()
        read.clear()
        for layer, weights in checkpoint.load(expert_map, on_bytes=read.append):
            assert weights.local_experts == expert_map.num_local
            (experts,) = weights.formats
            for expert, slot in enumerate(slots):
                if slot >= 0:
                    for stack, whole in zip((experts.w13, experts.w2), expected[layer], strict=True):
                        assert torch.equal(expert_matrix(stack, slot, torch.bfloat16), whole[expert]), (layer, expert)
        assert sum(read) == checkpoint.bytes_of(expert_map)
