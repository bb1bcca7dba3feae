"""Ernie-VL has two groups of experts in a layer, for text and for images: either is loaded, as transformers has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from epfuse import ExpertMap
from epfuse.cli.main import main
from epfuse.errors import CheckpointError, ConfigError, EpfuseError, ShapeError
from epfuse.weights.checkpoint import ExpertCheckpoint
from epfuse.weights.projections import expert_matrix

EXPERTS, WIDTHS = 4, (96, 32)
MODULE = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder that transformers wrote, and the model that it makes of it again."""
    text = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "moe_num_experts": EXPERTS, "moe_k": 2, "moe_intermediate_size": list(WIDTHS),
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [4, 2, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    config = transformers.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    kind = transformers.Ernie4_5_VLMoeForConditionalGeneration
    folder = tmp_path_factory.mktemp("ernie") / "model"
    kind(config).bfloat16().save_pretrained(folder)
    return folder, kind.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.fixture
def folder(made: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    (tmp_path / "config.json").write_bytes((made[0] / "config.json").read_bytes())
    save_file(load_file(made[0] / "model.safetensors"), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(("group", "name"), [(0, "text_moe"), (1, "vision_moe")])
def test_each_group_has_the_numbers_that_transformers_has(made: tuple[Path, Any], group: int, name: str) -> None:
    folder, model = made
    checkpoint = ExpertCheckpoint(folder, group)
    assert (checkpoint.model.intermediate, checkpoint.model.beside) == (WIDTHS[group], ())
    theirs = getattr(model.model.language_model.layers[1].mlp, name).experts
    for rank in range(3):
        expert_map, read = ExpertMap.contiguous(EXPERTS, 3, rank), list[int]()
        ((layer, weights),) = checkpoint.load(expert_map, on_bytes=read.append)
        assert layer == 1
        assert sum(read) == checkpoint.bytes_of(expert_map) == expert_map.num_local * 3 * 64 * WIDTHS[group] * 2
        for expert, slot in enumerate(expert_map.on(torch.device("cpu")).tolist()):
            if slot >= 0:
                (experts,) = weights.formats
                for stack, whole in ((experts.w13, theirs.gate_up_proj), (experts.w2, theirs.down_proj)):
                    assert torch.equal(expert_matrix(stack, slot, torch.bfloat16), whole[expert].detach())


def test_a_group_must_be_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="2 groups of experts in a layer; group must say which"):
        ExpertCheckpoint(folder)
    with pytest.raises(ConfigError, match="group is 2"):
        ExpertCheckpoint(folder, 2)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        # an error of the group that is not loaded counts too
        (lambda t: t.pop(f"{MODULE}.7.up_proj.weight"), CheckpointError, "group 1, lacks the weight of expert 3's up"),
        (
            lambda t: t.update({f"{MODULE}.8.up_proj.weight": t[f"{MODULE}.7.up_proj.weight"].clone()}),
            CheckpointError,
            r"experts\.8\.up_proj\.weight is the weight of expert 4's up, which E=4",
        ),
        (
            lambda t: t.update({f"{MODULE}.4.down_proj.weight": t[f"{MODULE}.3.down_proj.weight"].clone()}),
            ShapeError,
            r"experts\.4\.down_proj\.weight has shape \(64, 96\)",
        ),
    ],
)
def test_both_groups_are_checked(folder: Path, change: Any, error: type[EpfuseError], words: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(error, match=words):
        ExpertCheckpoint(folder, 0)


def test_a_folder_is_described_a_group_at_a_time(made: tuple[Path, Any]) -> None:
    for group, width in enumerate(WIDTHS):
        words = ["checkpoint", "inspect", str(made[0]), "--ep-size", "2", "--group", str(group), "--json"]
        found = CliRunner().invoke(main, words)
        assert found.exit_code == 0, found.output
        record = json.loads(found.stdout)
        assert (record["experts"], record["intermediate"]) == (EXPERTS, width)
        assert record["bytes"] == EXPERTS * 3 * 64 * width * 2
