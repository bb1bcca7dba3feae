"""Model families whose experts epfuse knows: where their config.json has the sizes, layers and activation.

Names and defaults are from transformers' configuration classes; `tests/weights/test_config_families.py` compares
every row with the classes' own models. What hub files write besides (``moe_num_experts``, ``moe_layer_freq``, ..) is an
alias here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from epfuse.arguments import checks_enums
from epfuse.config import Activation, GELUTanh, ReLU2, SoftcappedSwiGLU, SwiGLUOAI, silu_gate
from epfuse.errors import ConfigError
from epfuse.weights.config_fields import Fields
from epfuse.weights.config_layers import (
    LayerRule,
    after_first,
    by_block_type,
    counted_layers,
    ernie,
    every,
    every_if,
    interleaved,
    listed,
    listed_blocks,
    periodic,
    stepped,
    trimmed,
)
from epfuse.weights.layouts import GateUpRows

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
OWN_WIDTH = ("moe_intermediate_size",)
"""Where experts are narrower than dense layers."""
ONLY_WIDTH = ("intermediate_size",)
"""Where that is the experts' width."""

Activations = tuple[Activation, dict[int, Activation | None]]
"""Of most layers, and of those that have another one; None for one that epfuse does not compute."""


def silu(config: Fields, layers: int) -> Activations:
    """``silu(gate) * up``; what an activation's name is missing for is that.

    Raises:
        ConfigError: ``hidden_act`` is another one.
    """
    name = config.get("hidden_act")
    if name not in (None, "silu", "swish"):
        raise config.refuse(f"hidden_act is {name!r:.40}; it must be 'silu'")
    return silu_gate(), {}


def clamped_silu(config: Fields, layers: int) -> Activations:
    """``silu(min(gate, limit)) * clamp(up, -limit, limit)``, limit 10 where none is given."""
    silu(config, layers)
    return SwiGLUOAI(alpha=1.0, beta=0.0, limit=_limit(config, 10.0)), {}


def swiglu_oai(config: Fields, layers: int) -> Activations:
    """SwiGLU-OAI; its name or silu stands in ``hidden_act``."""
    name = config.get("hidden_act")
    if name not in (None, "silu", "swigluoai"):
        raise config.refuse(f"hidden_act is {name!r:.40}; it must be 'silu' or 'swigluoai'")
    return SwiGLUOAI(alpha=config.number("swiglu_alpha", 1.702), limit=_limit(config, 7.0)), {}


def silu_with_step_limits(config: Fields, layers: int) -> Activations:
    """``silu(gate) * up``, but in layers with a limit ``min(silu(gate), limit)``, which SwiGLU-OAI can't say."""
    config.get("swiglu_limits_shared")  # of the shared experts
    limits = config.get("swiglu_limits")
    if limits is None:
        return silu(config, layers)
    if not isinstance(limits, list) or not all(v is None or type(v) in (int, float) for v in limits):
        raise config.refuse("swiglu_limits must be a list of numbers, one a layer")
    clamped = [layer for layer, limit in enumerate(trimmed(config, "swiglu_limits", limits, layers)) if limit]
    return silu(config, layers)[0], dict.fromkeys(clamped)


def gelu_tanh(config: Fields, layers: int) -> Activations:
    """GELU's approximation by tanh; its name must stand in ``hidden_activation``, or nothing."""
    name = config.get("hidden_activation")
    if name not in (None, "gelu_pytorch_tanh"):
        raise config.refuse(f"hidden_activation is {name!r:.40}; it must be 'gelu_pytorch_tanh'")
    return GELUTanh(), {}


def relu2(config: Fields, layers: int) -> Activations:
    """The square of ReLU, without a gate; its name must stand in ``mlp_hidden_act``, or nothing."""
    name = config.get("mlp_hidden_act")
    if name not in (None, "relu2"):
        raise config.refuse(f"mlp_hidden_act is {name!r:.40}; it must be 'relu2'")
    return ReLU2(), {}


def softcapped(config: Fields, layers: int) -> Activations:
    """SwiGLU with a soft cap on either factor, 4 and 25 where none is given."""
    silu(config, layers)
    gate, up = config.number("mlp_gate_softcap", 4.0), config.number("mlp_up_softcap", 25.0)
    try:
        return SoftcappedSwiGLU(gate, up), {}
    except ConfigError as error:
        raise config.refuse(f"mlp_gate_softcap or mlp_up_softcap is out of range: {error}") from None


def _limit(config: Fields, default: float) -> float:
    limit = config.number("swiglu_limit", default)
    if limit <= 0:
        raise config.refuse(f"swiglu_limit is {limit:g}; it must be positive")
    return limit


def shared_if(*keys: str) -> Callable[[Fields], int]:
    """One shared expert where a layer for it has a width."""
    return lambda config: int(any(config.size(key, least=0, default=0) for key in keys))


def _counted(config: Fields) -> int:
    return config.size(*SHARED, least=0, default=0)


def _one(config: Fields) -> int:
    return config.size(*SHARED, least=0, default=1)


def _model_width(config: Fields) -> int:
    return config.size("hidden_size")


def _latent_width(config: Fields) -> int:
    """Experts between two projections to a narrower width, where there is one."""
    hidden = _model_width(config)
    return config.size("moe_latent_size", default=hidden)


@checks_enums
@dataclass(frozen=True)
class ModelFamily:
    """How a family's config.json is read.

    Attributes:
        layers: which layers have experts.
        width: names of I.
        hidden: H of the experts.
        count: how many layers there are.
        activation: what stands between the projections.
        shared: how many experts every token visits besides its K.
        module: where in a layer the experts are, in the checkpoint's names.
        gate_up: how gate and up rows lie in stacks of all experts.
        has_bias: the projections have biases, in every checkpoint of the family.
        weights_input: the router weight is applied to the experts' inputs.
        groups: how many groups of experts a layer has, one for each kind of tokens; I is a list of so many where there
            are several.
    """

    layers: LayerRule = every
    width: tuple[str, ...] = OWN_WIDTH
    hidden: Callable[[Fields], int] = _model_width
    count: Callable[[Fields], int] = counted_layers
    activation: Callable[[Fields, int], Activations] = silu
    shared: Callable[[Fields], int] = _counted
    module: str = "mlp.experts"
    gate_up: GateUpRows = GateUpRows.HALVES
    has_bias: bool = False
    weights_input: bool = False
    groups: int = 1

    def widths(self, config: Fields) -> list[int]:
        """I of each group of experts of a layer.

        Raises:
            ConfigError: the config gives no such sizes.
        """
        if self.groups == 1:
            return [config.size(*self.width)]
        (key,) = self.width
        found = config.array(key, int, "widths") or []
        if len(found) != self.groups or min(found) < 1:
            raise config.refuse(f"{key} is {found!r:.60}; it must be a list of {self.groups} positive integers")
        return found


_SPARSE_BLOCK = "block_sparse_moe.experts"
_MINIMAX_M3 = ModelFamily(listed(every), ONLY_WIDTH, activation=swiglu_oai, shared=_one, module=_SPARSE_BLOCK)
_DEEPSEEK = ModelFamily(after_first(3))
_QWEN = ModelFamily(stepped, shared=shared_if("shared_expert_intermediate_size"))
_QWEN_EVERY = ModelFamily(every, shared=shared_if("shared_expert_intermediate_size"))
_QWEN_VL = ModelFamily(stepped)
_FIRST_DENSE = ModelFamily(listed(after_first(1)))
_HY_V4 = ModelFamily(listed(after_first(1)), activation=clamped_silu)
_INKLING2 = ModelFamily(every, activation=softcapped)
_GRANITE = ModelFamily(every, ONLY_WIDTH, shared=shared_if("shared_intermediate_size"), module=_SPARSE_BLOCK)

FAMILIES = {
    "afmoe": ModelFamily(after_first(1, "num_dense_layers")),
    "aria_text": ModelFamily(every, ONLY_WIDTH),
    "axk1": _FIRST_DENSE,
    "axk2": _FIRST_DENSE,
    "bailing_hybrid": ModelFamily(listed(after_first(2))),
    "beam": ModelFamily(listed(after_first(3))),
    "cohere2_moe": ModelFamily(listed(after_first(0)), ONLY_WIDTH),
    "deepseek_ocr2_text": ModelFamily(listed(after_first(1))),
    "deepseek_v2": ModelFamily(after_first(0)),
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": ModelFamily(listed(after_first(3))),
    "deepseek_v4": ModelFamily(listed(every), activation=clamped_silu, module="ffn.experts"),
    "diffusion_gemma_text": ModelFamily(every, activation=gelu_tanh, module="experts"),
    "dots1": ModelFamily(after_first(0)),
    "dots3_note_text": _FIRST_DENSE,
    "ernie4_5_moe": ModelFamily(ernie),
    "ernie4_5_vl_moe_text": ModelFamily(listed(after_first(1)), groups=2),
    "exaone_moe": _FIRST_DENSE,
    "flex_olmo": ModelFamily(every, ONLY_WIDTH),
    "flint": ModelFamily(
        lambda config, layers: stepped(config, layers, (0, 1)), shared=shared_if("shared_expert_intermediate_size")
    ),
    "gemma4_text": ModelFamily(every_if("enable_moe_block"), activation=gelu_tanh, module="experts"),
    "glm4_moe": ModelFamily(after_first(1)),
    "glm4_moe_lite": _FIRST_DENSE,
    "glm4v_moe_text": ModelFamily(after_first(1)),
    "glm5_next_text": ModelFamily(listed(after_first(3)), activation=clamped_silu),
    "glm_moe_dsa": ModelFamily(listed(after_first(3))),
    "gpt_oss": ModelFamily(every, ONLY_WIDTH, activation=swiglu_oai, gate_up=GateUpRows.ALTERNATING, has_bias=True),
    "granitemoe": _GRANITE,
    "granitemoe_swa": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "granitemoeshared": _GRANITE,
    "hunyuan_v1_moe": ModelFamily(every, (*ONLY_WIDTH, *OWN_WIDTH), shared=_one),
    "hy_v3": _FIRST_DENSE,
    "hy_v4": _HY_V4,
    "hy_v4_vl_text": _HY_V4,
    "inkling2_loop_text": _INKLING2,
    "inkling2_text": _INKLING2,
    "inkling_text": ModelFamily(listed(every)),
    "jamba": ModelFamily(periodic, ONLY_WIDTH, module="feed_forward.experts"),
    "kimi_k2": _DEEPSEEK,
    "kimi_linear": ModelFamily(listed(after_first(1)), module=_SPARSE_BLOCK),
    "kolibri1": _QWEN_EVERY,
    "laguna": ModelFamily(listed(after_first(1)), shared=shared_if("shared_expert_intermediate_size")),
    "lara_mini": _QWEN_EVERY,
    "lfm2_moe": ModelFamily(after_first(2, "num_dense_layers"), module="feed_forward.experts"),
    "llama4_text": ModelFamily(interleaved, ONLY_WIDTH, shared=_one, module="feed_forward.experts", weights_input=True),
    "mellum": ModelFamily(listed(every)),
    "mimo_v2_flash": _FIRST_DENSE,
    "minimax": ModelFamily(every, ONLY_WIDTH, module=_SPARSE_BLOCK),
    "minimax_m2": ModelFamily(every, ONLY_WIDTH, module=_SPARSE_BLOCK),
    "minimax_m3": _MINIMAX_M3,
    "minimax_m3_text": _MINIMAX_M3,
    "minimax_m3_vl_text": _MINIMAX_M3,
    "mistral4": ModelFamily(after_first(0)),
    "mistral_large4_text": _FIRST_DENSE,
    "mixtral": ModelFamily(every, ONLY_WIDTH, module=_SPARSE_BLOCK),
    "nemotron_h": ModelFamily(
        by_block_type, hidden=_latent_width, count=listed_blocks, activation=relu2, module="mixer.experts"
    ),
    "olmoe": ModelFamily(every, ONLY_WIDTH),
    "openai_privacy_filter": ModelFamily(every, ONLY_WIDTH, activation=swiglu_oai, has_bias=True),
    "phimoe": ModelFamily(every, ONLY_WIDTH, module=_SPARSE_BLOCK),
    "qwen2_moe": _QWEN,
    "qwen3_5_moe_text": _QWEN_EVERY,
    "qwen3_moe": _QWEN,
    "qwen3_next": _QWEN,
    "qwen3_omni_moe_text": _QWEN_VL,
    "qwen3_vl_moe_text": _QWEN_VL,
    "qwen4_exp_text": _QWEN_EVERY,
    "solar_open": ModelFamily(every),
    "step3p5": ModelFamily(listed(after_first(3)), activation=silu_with_step_limits, shared=_one, module="moe"),
    "unlimited_ocr_text": _FIRST_DENSE,
    "zaya": ModelFamily(every),
}
"""Model type of the language model -> how its config.json is read."""

OUTER = {
    "aria": "aria_text",
    "deepseek_ocr2": "deepseek_ocr2_text",
    "diffusion_gemma": "diffusion_gemma_text",
    "dots3_note": "dots3_note_text",
    "ernie4_5_vl_moe": "ernie4_5_vl_moe_text",
    "gemma4": "gemma4_text",
    "glm4v_moe": "glm4v_moe_text",
    "glm5_next": "glm5_next_text",
    "hy_v4_vl": "hy_v4_vl_text",
    "inkling2": "inkling2_text",
    "inkling2_loop": "inkling2_loop_text",
    "inkling_mm_model": "inkling_text",
    "kimi_k25": "deepseek_v3",
    "llama4": "llama4_text",
    "minimax_m3_vl": "minimax_m3_vl_text",
    "mistral_large4": "mistral_large4_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "qwen4_exp": "qwen4_exp_text",
    "step3p7": "step3p5",
    "unlimited_ocr": "unlimited_ocr_text",
}
"""Model type of a model around a language model -> the latter's, where it does not say it itself."""
UNPLANNED = {
    "longcat_flash": "some of its experts have no weights",
    "muse_spark": "a norm stands between the experts and the router weights",
}
"""Model type -> why its experts are no layer that a plan can be made for."""
NESTED = ("text_config", "language_config", "thinker_config", "llm_config")
"""Where such a model has the language model's config."""
