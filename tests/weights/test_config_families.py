"""Every known family beside transformers' own model of it, on the meta device: sizes, layers and activations."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn

from epfuse.compiled.model import model_layers
from epfuse.config import Activation, Policy, SwiGLUOAI, silu_gate
from epfuse.errors import ConfigError, EpfuseError
from epfuse.hardware.products import PRODUCTS
from epfuse.integrations.transformers import activation_of, check_layout
from epfuse.integrations.transformers.layout import check_in_place
from epfuse.integrations.vllm.explain import Deployment, explain
from epfuse.planning.model_plan import Serving, plan_model
from epfuse.policy import Storage
from epfuse.policy.facts import model_facts
from epfuse.policy.refusals import layer_refusal
from epfuse.stages.activation_reference import swiglu_oai
from epfuse.target import Target
from epfuse.weights.config_families import FAMILIES, OUTER, UNPLANNED
from epfuse.weights.model_config import ExpertModel, load_config, model_of, read_model

transformers = pytest.importorskip("transformers")

LAYERS = 8


@dataclass(frozen=True)
class Built:
    """One of transformers' models.

    Attributes:
        config: class of its config.
        model: class of the model.
        module: of transformers.models, where both are.
        values: what the config's defaults leave open.
        since: the release of transformers that first has it, where that is not the pinned one.
    """

    module: str
    config: str
    model: str
    values: dict[str, Any] = field(default_factory=dict)
    since: str = "5.23"

    @property
    def is_here(self) -> bool:
        """Whether the transformers that is imported has it."""
        return Version(transformers.__version__) >= Version(self.since)


MODELS = {
    "afmoe": Built("afmoe", "AfmoeConfig", "AfmoeModel"),
    "aria_text": Built("aria", "AriaTextConfig", "AriaTextModel"),
    "axk1": Built("axk1", "AXK1Config", "AXK1Model"),
    "axk2": Built("axk2", "AXK2Config", "AXK2Model"),
    "bailing_hybrid": Built("bailing_hybrid", "BailingHybridConfig", "BailingHybridModel"),
    "beam": Built("beam", "BeamConfig", "BeamModel"),
    "cohere2_moe": Built("cohere2_moe", "Cohere2MoeConfig", "Cohere2MoeModel"),
    "deepseek_ocr2_text": Built(
        "deepseek_ocr2",
        "DeepseekOcr2TextConfig",
        "DeepseekOcr2TextModel",
        {"num_experts_per_tok": 6, "mlp_layer_types": ["dense"] + ["sparse"] * 7},
    ),
    "deepseek_v2": Built("deepseek_v2", "DeepseekV2Config", "DeepseekV2Model", {"num_experts_per_tok": 6}),
    "deepseek_v3": Built("deepseek_v3", "DeepseekV3Config", "DeepseekV3Model"),
    "deepseek_v32": Built("deepseek_v32", "DeepseekV32Config", "DeepseekV32Model"),
    "deepseek_v4": Built("deepseek_v4", "DeepseekV4Config", "DeepseekV4Model"),
    "diffusion_gemma_text": Built(
        "diffusion_gemma",
        "DiffusionGemmaTextConfig",
        "DiffusionGemmaEncoderTextModel",
        {"num_experts": 16, "top_k_experts": 4, "moe_intermediate_size": 704},
    ),
    "dots1": Built(
        "dots1",
        "Dots1Config",
        "Dots1Model",
        {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    ),
    "dots3_note_text": Built("dots3_note", "Dots3NoteTextConfig", "Dots3NoteTextModel"),
    "ernie4_5_vl_moe_text": Built(
        "ernie4_5_vl_moe", "Ernie4_5_VLMoeTextConfig", "Ernie4_5_VLMoeTextModel", {"moe_intermediate_size": [192, 64]}
    ),
    "ernie4_5_moe": Built("ernie4_5_moe", "Ernie4_5_MoeConfig", "Ernie4_5_MoeModel", {"moe_layer_interval": 2}),
    "exaone_moe": Built("exaone_moe", "ExaoneMoeConfig", "ExaoneMoeModel"),
    "flex_olmo": Built("flex_olmo", "FlexOlmoConfig", "FlexOlmoModel"),
    "flint": Built("flint", "FlintConfig", "FlintModel"),
    "gemma4_text": Built(
        "gemma4",
        "Gemma4TextConfig",
        "Gemma4TextModel",
        {"enable_moe_block": True, "num_experts": 16, "top_k_experts": 4, "moe_intermediate_size": 704},
    ),
    "glm4_moe": Built("glm4_moe", "Glm4MoeConfig", "Glm4MoeModel"),
    "glm4_moe_lite": Built("glm4_moe_lite", "Glm4MoeLiteConfig", "Glm4MoeLiteModel"),
    "glm4v_moe_text": Built("glm4v_moe", "Glm4vMoeTextConfig", "Glm4vMoeTextModel"),
    "glm5_next_text": Built("glm5_next", "Glm5NextTextConfig", "Glm5NextTextModel"),
    "glm_moe_dsa": Built("glm_moe_dsa", "GlmMoeDsaConfig", "GlmMoeDsaModel"),
    "gpt_oss": Built("gpt_oss", "GptOssConfig", "GptOssModel"),
    "granitemoe": Built("granitemoe", "GraniteMoeConfig", "GraniteMoeModel"),
    "granitemoe_swa": Built("granitemoe_swa", "GraniteMoeSWAConfig", "GraniteMoeSWAModel"),
    "granitemoehybrid": Built("granitemoehybrid", "GraniteMoeHybridConfig", "GraniteMoeHybridModel"),
    "granitemoeshared": Built("granitemoeshared", "GraniteMoeSharedConfig", "GraniteMoeSharedModel"),
    "hunyuan_v1_moe": Built(
        "hunyuan_v1_moe",
        "HunYuanMoEV1Config",
        "HunYuanMoEV1Model",
        {"num_experts": 64, "moe_topk": 8, "intermediate_size": 3072, "head_dim": 128},
    ),
    "hy_v3": Built("hy_v3", "HYV3Config", "HYV3Model"),
    "hy_v4": Built("hy_v4", "HYV4Config", "HYV4Model"),
    "hy_v4_vl_text": Built("hy_v4_vl", "HYV4VLTextConfig", "HYV4VLTextModel", {"swiglu_limit": 8.0}, "5.24"),
    "inkling2_loop_text": Built(
        "inkling2_loop",
        "Inkling2LoopTextConfig",
        "Inkling2LoopTextModel",
        {"loop_layer_index_end": 6, "mlp_up_softcap": 20.0},
        "5.24",
    ),
    "inkling2_text": Built(
        "inkling2", "Inkling2TextConfig", "Inkling2TextModel", {"mlp_gate_softcap": 3.0, "mlp_up_softcap": 20.0}
    ),
    "inkling_text": Built("inkling", "InklingTextConfig", "InklingTextModel"),
    "jamba": Built("jamba", "JambaConfig", "JambaModel"),
    "kimi_linear": Built("kimi_linear", "KimiLinearConfig", "KimiLinearModel"),
    "kolibri1": Built("kolibri1", "Kolibri1Config", "Kolibri1Model"),
    "laguna": Built("laguna", "LagunaConfig", "LagunaModel"),
    "lara_mini": Built("lara_mini", "LaraMiniConfig", "LaraMiniModel", since="5.24"),
    "lfm2_moe": Built("lfm2_moe", "Lfm2MoeConfig", "Lfm2MoeModel", {"layer_types": ["full_attention"] * LAYERS}),
    "llama4_text": Built("llama4", "Llama4TextConfig", "Llama4TextModel", {"interleave_moe_layer_step": 2}),
    "mellum": Built("mellum", "MellumConfig", "MellumModel"),
    "mimo_v2_flash": Built("mimo_v2_flash", "MiMoV2FlashConfig", "MiMoV2FlashModel"),
    "minimax": Built("minimax", "MiniMaxConfig", "MiniMaxModel"),
    "minimax_m2": Built("minimax_m2", "MiniMaxM2Config", "MiniMaxM2Model"),
    "minimax_m3_vl_text": Built(
        "minimax_m3_vl", "MiniMaxM3VLTextConfig", "MiniMaxM3VLTextModel", {"moe_layer_freq": [0] * 3 + [1] * 5}
    ),
    "mistral4": Built("mistral4", "Mistral4Config", "Mistral4Model"),
    "mistral_large4_text": Built("mistral_large4", "MistralLarge4TextConfig", "MistralLarge4TextModel"),
    "mixtral": Built("mixtral", "MixtralConfig", "MixtralModel"),
    "nemotron_h": Built(
        "nemotron_h",
        "NemotronHConfig",
        "NemotronHModel",
        {"moe_latent_size": 1024, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2},
    ),
    "olmoe": Built("olmoe", "OlmoeConfig", "OlmoeModel"),
    "openai_privacy_filter": Built(
        "openai_privacy_filter", "OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterModel", {"swiglu_limit": 6.0}
    ),
    "phimoe": Built("phimoe", "PhimoeConfig", "PhimoeModel"),
    "qwen2_moe": Built(
        "qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeModel", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}
    ),
    "qwen3_5_moe_text": Built("qwen3_5_moe", "Qwen3_5MoeTextConfig", "Qwen3_5MoeTextModel"),
    "qwen3_moe": Built("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeModel"),
    "qwen3_next": Built("qwen3_next", "Qwen3NextConfig", "Qwen3NextModel"),
    "qwen3_omni_moe_text": Built("qwen3_omni_moe", "Qwen3OmniMoeTextConfig", "Qwen3OmniMoeThinkerTextModel"),
    "qwen3_vl_moe_text": Built("qwen3_vl_moe", "Qwen3VLMoeTextConfig", "Qwen3VLMoeTextModel"),
    "qwen4_exp_text": Built(
        "qwen4_exp", "Qwen4ExpTextConfig", "Qwen4ExpTextModel", {"layer_types": ["linear_attention"] * LAYERS}
    ),
    "solar_open": Built("solar_open", "SolarOpenConfig", "SolarOpenModel"),
    "step3p5": Built("step3p7", "Step3p7TextConfig", "Step3p7TextModel", {"swiglu_limits": [0.0] * 6 + [7.0, 7.0]}),
    "unlimited_ocr_text": Built("unlimited_ocr", "UnlimitedOcrTextConfig", "UnlimitedOcrTextModel"),
    "zaya": Built("zaya", "ZayaConfig", "ZayaModel"),
}
ALIASES = {"minimax_m3", "minimax_m3_text", "kimi_k2"}
"""Types that only hub files have; they are read as another family."""
TRANSPOSED = {"aria_text", "gpt_oss", "llama4_text", "openai_privacy_filter"}
"""Families whose experts are ``[E, H, 2I]``."""


def test_every_family_has_a_model_to_compare_with() -> None:
    assert set(MODELS) | ALIASES == set(FAMILIES)
    assert set(OUTER.values()) <= set(FAMILIES)


def test_no_family_of_transformers_is_forgotten() -> None:
    models = Path(transformers.__file__).parent / "models"
    found = {
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if re.search(r"self\.(gate_)?up_proj = nn\.Parameter", path.read_text(encoding="utf-8"))
    }
    assert found == {built.module for built in MODELS.values() if built.is_here} | set(UNPLANNED)


@pytest.mark.parametrize(
    ("module", "config", "words"),
    [
        ("muse_spark", "MuseSparkConfig", "a norm stands between the experts and the router weights"),
        ("muse_spark", "MuseSparkTextConfig", "a norm stands between the experts and the router weights"),
        ("longcat_flash", "LongcatFlashConfig", "some of its experts have no weights"),
    ],
)
def test_a_family_without_plans_is_refused_with_the_reason(
    tmp_path: Path, module: str, config: str, words: str
) -> None:
    configs = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    getattr(configs, config)().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"no plan is made: .*{words}"):
        read_model(tmp_path)


def test_a_layer_with_two_groups_of_experts_is_planned_and_explained(tmp_path: Path) -> None:
    """Ernie-VL: experts of text and of images, E of each, with an I each."""
    module = importlib.import_module("transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe")
    module.Ernie4_5_VLMoeConfig().save_pretrained(tmp_path)
    model = read_model(tmp_path)
    assert (model.intermediate, model.beside) == (1536, (512,))
    deployment = Deployment(Target.SM90, "0.33.0", 1, True, 4096)
    assert [group.intermediate for group in explain(model, deployment)] == [1536, 512]
    kinds = model_layers(model, Target.SM90, None, 1, 1).layers
    assert {kind.shape.intermediate for kind in kinds} == {1536, 512}
    for widths in (1536, [1536], [1536, 0], [1536, 512, 512], ["1536", 512], [True, 512]):
        content = load_config(tmp_path / "config.json")
        content["text_config"]["moe_intermediate_size"] = widths
        with pytest.raises(ConfigError, match="moe_intermediate_size"):
            model_of(content, "ernie")


def build(built: Built, tmp_path: Path) -> tuple[Any, nn.Module, ExpertModel]:
    """transformers' config, its model on the meta device, and what we read of the config's file."""
    if not built.is_here:
        pytest.skip(f"{built.module} is in transformers {built.since}")
    package = f"transformers.models.{built.module}"
    values = {"num_hidden_layers": LAYERS} | built.values
    config = getattr(importlib.import_module(f"{package}.configuration_{built.module}"), built.config)(**values)
    with torch.device("meta"):
        model = getattr(importlib.import_module(f"{package}.modeling_{built.module}"), built.model)(config)
    config.save_pretrained(tmp_path)
    return config, model, read_model(tmp_path)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_sizes_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    config, whole, found = build(MODELS[name], tmp_path)
    experts: dict[int, list[nn.Module]] = {}
    for path, module in whole.named_modules():
        if _has_experts(module):
            experts.setdefault(int(path.split(".")[1]), []).append(module)
    assert found.moe_layers == tuple(sorted(experts))
    assert found.layers == config.num_hidden_layers
    assert {len(modules) for modules in experts.values()} == {len(found.parts)}
    for layer, module, part in (
        (layer, *pair) for layer, modules in experts.items() for pair in zip(modules, found.parts, strict=True)
    ):
        first, second = tuple(_first(module).shape), tuple(module.down_proj.shape)
        if name in TRANSPOSED:
            first, second = (first[0], first[2], first[1]), (second[0], second[2], second[1])
        if name != "llama4_text":  # the router weight is applied to its inputs
            check_layout(name, module)
        assert first == (part.experts, part.activation.inputs * part.intermediate, part.hidden)
        assert second == (part.experts, part.hidden, part.intermediate)
        _check_activation(name, module, found.activation_at(layer))
    assert (found.shared_experts > 0) == any("shared" in path for path, _ in whole.named_modules())
    _check_plan(found, {layer: all(map(_is_taken, modules)) for layer, modules in experts.items()})
    routers = {module.top_k for module in whole.modules() if isinstance(getattr(module, "top_k", None), int)}
    routers |= {config.top_k_experts} if hasattr(config, "top_k_experts") else set()  # Gemma's router asks it
    assert found.top_k in routers


def _is_taken(module: nn.Module) -> bool:
    """By the rules of `register`, which `replace_experts` has too."""
    try:
        check_in_place("", module)
        activation_of("experts", module)
    except EpfuseError:
        return False
    return True


def _check_plan(found: ExpertModel, taken: dict[int, bool]) -> None:
    """`epfuse plan` and `epfuse vllm explain` take the layers that transformers' integration takes, and no other."""
    product = PRODUCTS["h200"]
    plan = plan_model(found, Serving(product, 1, 4096, 2**50), Policy.AUTO)  # whatever its size
    planned = {layer: not group.plan.is_untouched for group in plan.groups for layer in group.layers}
    assert planned == taken
    for part in found.parts:
        facts = [model_facts(part, layer, target=product.target, max_model_len=4096) for layer in taken]
        assert {fact.layer: layer_refusal(fact) is None for fact in facts} == taken
    widths = [part.intermediate for part in found.parts]
    matrices = found.activation.inputs + 1
    biases = 4 * found.experts * (found.activation.inputs * sum(widths) + found.hidden) * found.has_bias
    weights = 2 * found.experts * found.hidden * matrices * sum(widths)
    assert plan.stored_bytes(Storage.BF16) == len(taken) * (weights + biases)


def _check_activation(name: str, module: Any, activation: Activation | None) -> None:
    """Against the module's own, far out and around every limit; where we have none, its own must be no SwiGLU-OAI."""
    if name in TRANSPOSED - {"llama4_text"} or not isinstance(activation, SwiGLUOAI | None):
        assert activation_of(name, module) == activation
        return
    if not hasattr(module, "_apply_gate"):
        return
    around = torch.tensor([0.0, 0.5, 1.0, 6.9, 7.0, 7.1, 9.9, 10.0, 10.1, 40.0, 1e4], dtype=torch.float64)
    points = torch.cat([-around.flip(0), around])
    rows = torch.cartesian_prod(points, points)
    own = module._apply_gate(rows)
    if activation is None:
        assert not torch.allclose(own, swiglu_oai(rows, silu_gate()))
        assert all(not torch.allclose(own, swiglu_oai(rows, SwiGLUOAI(1.0, 0.0, limit))) for limit in (7.0, 10.0))
    else:
        torch.testing.assert_close(own, swiglu_oai(rows, activation), rtol=1e-6, atol=1e-6)  # some compute in FP32


def _has_experts(module: nn.Module) -> bool:
    return isinstance(_first(module), nn.Parameter)


def _first(module: Any) -> Any:
    return getattr(module, "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", None)
