"""A rank's experts out of a Hugging Face folder: the numbers that transformers' own from_pretrained finds there."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from epfuse import ExpertMap, fused_experts
from epfuse.demo.checkpoint import RECIPES, make_checkpoint
from epfuse.demo.settings import ModelSize
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.reference import run_reference
from epfuse.verify.budget import compare, dense_tolerance
from epfuse.weights.checkpoint import ExpertCheckpoint
from epfuse.weights.checkpoint_format import Checkpoint
from epfuse.weights.projections import expert_matrix

EXPERTS = 6
MADE = [(family, form) for family, recipe in RECIPES.items() for form in recipe.formats]


def size_of(family: str) -> ModelSize:
    dense = 0 if family in ("mixtral", "gpt_oss", "aria_text", "gemma4_text") else 1
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


def transformers_experts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Layer -> the experts' module, by from_pretrained."""
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
    more: dict[str, Any] = {"experts_implementation": "eager"}
    if config.get("quantization_config", {}).get("quant_method") == "mxfp4":
        more["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    model, report = auto.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **more)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    experts = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
    return {int(name.split("layers.")[1].split(".")[0]): module for name, module in experts.items()}


def numbers(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """BF16 gate_up_proj ``[E, 2I, H]``, gate rows first, and down_proj ``[E, H, I]``."""
    gate_up, down = getattr(module, "gate_up_proj", getattr(module, "up_proj", None)), module.down_proj.detach()
    assert gate_up is not None
    gate_up = gate_up.detach()
    if gate_up.dtype == torch.float8_e4m3fn:
        gate_up = MXFP8(gate_up, module.gate_up_proj_scale_inv.detach()).dequantize(torch.bfloat16)
        down = MXFP8(down, module.down_proj_scale_inv.detach()).dequantize(torch.bfloat16)
    if getattr(module, "is_transposed", False):
        gate_up, down = gate_up.mT, down.mT
    return gate_first(module, gate_up), down


def gate_first(module: Any, rows: torch.Tensor) -> torch.Tensor:
    return rows if getattr(module, "is_concatenated", True) else torch.cat((rows[:, 0::2], rows[:, 1::2]), 1)


@pytest.mark.parametrize(("family", "form"), MADE)
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
            module = expected[layer]
            assert len(weights.biases) == (2 if getattr(module, "has_bias", False) else 0)
            for expert, slot in enumerate(slots):
                if slot >= 0:
                    for stack, whole in zip((experts.w13, experts.w2), numbers(module), strict=True):
                        assert torch.equal(expert_matrix(stack, slot, torch.bfloat16), whole[expert]), (layer, expert)
                    for name, bias in weights.biases:
                        own = getattr(module, name.replace("gate_up", "gate_up_proj").replace("down", "down_proj"))
                        whole = gate_first(module, own) if name == "gate_up_bias" else own
                        assert whole.abs().min(1).values.max() > 0  # not transformers' zeros
                        assert torch.equal(bias[slot], whole[expert].float()), (layer, expert)
        assert sum(read) == checkpoint.bytes_of(expert_map)


def peak_of(run: Any) -> int:
    """The most bytes of tensors on the CPU that lived at once while ``run()`` ran, beyond those of before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("form", [Checkpoint.BF16, Checkpoint.MXFP4])
def test_loading_takes_one_expert_beyond_the_result(folders: Any, form: Checkpoint) -> None:
    checkpoint = ExpertCheckpoint(folders("gpt_oss", form))
    expert_map, loaded = ExpertMap.contiguous(EXPERTS, 1, 0), []
    peak = peak_of(lambda: loaded.extend(checkpoint.load(expert_map)))
    ((_, weights),) = loaded
    result = sum(weights.nbytes.values()) + sum(bias.nbytes for _, bias in weights.biases)
    assert result <= peak <= result * (1 + 1 / EXPERTS)


OTHER_LAYERS = ("gpt_oss", "aria_text", "gemma4_text", "nemotron_h")
"""Families with biases, another activation or another layout."""


@pytest.mark.parametrize(("family", "form"), [pair for pair in MADE if pair[0] in OTHER_LAYERS])
def test_a_layer_out_of_a_folder_computes_what_transformers_computes(
    folders: Any, family: str, form: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own code in float64 on the same folder. A token with one expert twice, or none here, counts biases as often
    as it has routes."""
    folder = folders(family, form)
    (module,) = transformers_experts(folder, monkeypatch).values()
    checkpoint = ExpertCheckpoint(folder)
    generator = torch.Generator().manual_seed(1)
    tokens, hidden = 37, checkpoint.model.hidden
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.bfloat16)
    shares, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(2)
    ids[0] = ids[0, 0]
    with torch.no_grad():
        expected = module.double()(x.double(), ids, shares.double())
    exact, computed = torch.zeros(tokens, hidden, dtype=torch.float64), torch.zeros(tokens, hidden, dtype=torch.float64)
    for rank in range(4):
        expert_map = ExpertMap.contiguous(EXPERTS, 4, rank)
        ((_, weights),) = checkpoint.load(expert_map)
        call = (x, weights, shares, ids, expert_map)
        exact += run_reference(*call, checkpoint.model.activation, torch.float64)
        computed += fused_experts(*call, activation=checkpoint.model.activation).double()
    torch.testing.assert_close(exact, expected, rtol=1e-12, atol=1e-12)
    tolerance = dense_tolerance(torch.bfloat16, hidden, checkpoint.model.intermediate, sums=4)
    assert compare(computed, expected).within(tolerance)
