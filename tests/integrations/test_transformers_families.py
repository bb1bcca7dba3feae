"""Every experts class of the installed transformers: taken with which activation and right, or refused and why."""

from __future__ import annotations

import importlib
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

from epfuse import GELUTanh, ReLU2, SoftcappedSwiGLU, SwiGLUOAI
from epfuse.config import silu_gate
from epfuse.errors import EpfuseError
from epfuse.integrations.transformers import replace_experts
from epfuse.parallel.group import EPGroup

TAKEN = {
    "deepseek_v4.DeepseekV4Experts": SwiGLUOAI(1.0, 0.0, 10.0),
    "glm5_next.Glm5NextTextExperts": SwiGLUOAI(1.0, 0.0, 10.0),
    "hy_v4.HYV4Experts": SwiGLUOAI(1.0, 0.0, 10.0),
    "minimax_m3_vl.MiniMaxM3VLExperts": SwiGLUOAI(1.702, 1.0, 7.0),
    "gpt_oss.GptOssExperts": SwiGLUOAI(1.702, 1.0, 7.0),
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": SwiGLUOAI(1.702, 1.0, 7.0),
    "diffusion_gemma.DiffusionGemmaTextExperts": GELUTanh(),
    "gemma4.Gemma4TextExperts": GELUTanh(),
    "inkling2.Inkling2Experts": SoftcappedSwiGLU(4.0, 25.0),
    "nemotron_h.NemotronHExperts": ReLU2(),
}
"""What isn't plain ``silu(gate) * up``."""
REFUSED = {"muse_spark.MuseSparkExperts": "a norm after the experts"}
STEMS = {
    "ernie4_5_vl_moe.Ernie4_5_VLMoeMoeExperts": "Ernie4_5_VLMoe",
    "qwen3_omni_moe.Qwen3OmniMoeThinkerTextExperts": "Qwen3OmniMoe",
}
"""What the name of a configuration begins with, where it isn't what the name of the experts begins with."""
DECORATED = re.compile(r"^@use_experts_implementation(?:\([^)]*\))?\nclass (\w+)", re.MULTILINE)
SIZES = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 5),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), 8),
    **dict.fromkeys(("moe_intermediate_size", "intermediate_size"), 6),
}


def classes() -> dict[str, str]:
    """``family.Class`` -> name of the modeling module."""
    found = {}
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in DECORATED.findall(file.read_text(encoding="utf-8")):
            found[f"{file.parent.name}.{name}"] = f"transformers.models.{file.parent.name}.{file.stem}"
    return found


CLASSES = classes()


def experts_of(which: str, **changes: Any) -> Any:
    """A small module of the class, its weights seeded, with the family's own default configuration."""
    module = importlib.import_module(CLASSES[which])
    configs = vars(importlib.import_module(CLASSES[which].replace("modeling_", "configuration_")))
    experts = getattr(module, which.partition(".")[2])
    stem = STEMS.get(which) or experts.__name__.removesuffix("Experts")
    text = [config for name, config in configs.items() if re.fullmatch(rf"{stem}\w*Config", name)]
    text.sort(key=lambda config: (not config.__name__.endswith("TextConfig"), len(config.__name__)))
    config = text[0]()
    sizes = SIZES | changes
    for name, value in sizes.items():
        per_modality = isinstance(getattr(config, name, None), list)  # Ernie-4.5-VL: of text, of images
        setattr(config, name, [value, value] if per_modality else value)
    config._experts_implementation = "eager"
    built = experts(config, *([sizes["intermediate_size"]] if which.startswith("ernie4_5_vl") else []))
    generator = torch.Generator().manual_seed(0)
    for weight in built.parameters():
        nn.init.normal_(weight, std=0.5, generator=generator)
    return built


def test_there_are_families_to_walk() -> None:
    assert len({name.partition(".")[0] for name in CLASSES}) >= 64
    assert (TAKEN | REFUSED).keys() <= CLASSES.keys()


@torch.no_grad()
@pytest.mark.parametrize("which", CLASSES)
def test_every_family_is_right_or_refused(which: str) -> None:
    experts = experts_of(which)
    block: Any = nn.ModuleDict({"experts": experts})
    if which in REFUSED:
        with pytest.raises(EpfuseError, match=REFUSED[which]):
            replace_experts(block, EPGroup.single())
        assert block["experts"] is experts
        return
    replacement = replace_experts(block, EPGroup.single())
    assert replacement.experts["experts"].activation == TAKEN.get(which, silu_gate())
    generator = torch.Generator().manual_seed(1)
    exact = experts.double()
    for scale in (0.5, 30.0, 1e4, 1e9):  # an accumulator of up to 4e9: far beyond every limit
        hidden = torch.randn(24, 8, generator=generator) * scale
        ids = torch.rand(24, 5, generator=generator).topk(2).indices
        factors = torch.rand(24, 2, generator=generator)
        expected = exact(hidden.double(), ids, factors.double())
        error = (block["experts"](hidden, ids, factors) - expected).abs().amax(1)
        assert bool((error <= 2e-5 * expected.abs().amax(1)).all()), (scale, error)


@torch.no_grad()
@pytest.mark.parametrize("limit", [0.25, 10.0, 16.0, 1e6])
def test_the_limit_that_a_module_names_is_the_limit(limit: float) -> None:
    """HY-V4 with limit 16 and x = 20: transformers says 16 * 16 = 256."""
    sizes = dict.fromkeys(("hidden_size", "moe_intermediate_size", "num_local_experts"), 1)
    experts = experts_of("hy_v4.HYV4Experts", swiglu_limit=limit, **sizes)
    for weight in experts.parameters():
        weight.fill_(1.0)
    hidden = torch.tensor([[20.0], [limit], [-limit], [1e9], [-1e9]])
    ids, factors = torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)
    expected = experts(hidden, ids, factors)
    block: Any = nn.ModuleDict({"experts": experts})
    replace_experts(block, EPGroup.single())
    torch.testing.assert_close(block["experts"](hidden, ids, factors), expected)
    if limit == 16.0:
        assert math.isclose(float(expected[0]), 256.0, rel_tol=1e-5)
