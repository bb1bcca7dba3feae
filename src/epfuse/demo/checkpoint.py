"""Small checkpoints with seeded weights, in the names, formats and files that real ones have.

transformers builds the model and writes it, so that names and config.json are as on the hub. Experts (and in block
FP8 every linear layer, as DeepSeek-V3 has it) are then quantised and written under the names of quantised checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

from epfuse.arguments import checks_enums
from epfuse.demo.model import model_config
from epfuse.demo.settings import ModelSize
from epfuse.errors import ConfigError
from epfuse.numerics.e8m0 import decode_scales
from epfuse.numerics.mxfp8 import BLOCK as GROUP
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.report.write import check_output_folder, sync, write_atomic
from epfuse.weights.block_fp8 import BLOCK, BlockFP8, BlockScale
from epfuse.weights.checkpoint_format import Checkpoint

VOCAB = 320
HEAD_DIM = 32
BIAS_STD = 0.25
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@checks_enums
@dataclass(frozen=True)
class CheckpointRecipe:
    """How a family's checkpoint is made.

    Attributes:
        config: transformers' configuration of a size.
        formats: what the experts can be in, the default first.
    """

    config: Callable[[ModelSize], Any]
    formats: tuple[Checkpoint, ...]


def _minimax_m3(size: ModelSize) -> Any:
    config = transformers.MiniMaxM3VLConfig(
        text_config=model_config(size).to_dict(), projector_hidden_size=size.hidden, tie_word_embeddings=False
    )
    vision = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    return config


def _common(size: ModelSize) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.dense_layers + size.moe_layers,
        "num_attention_heads": 4,
        "num_experts_per_tok": size.top_k,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }


def _heads() -> dict[str, Any]:
    return {"num_key_value_heads": 2, "head_dim": HEAD_DIM}


def _qwen3_moe(size: ModelSize) -> Any:
    return transformers.Qwen3MoeConfig(
        **_common(size),
        **_heads(),
        num_experts=size.experts,
        moe_intermediate_size=size.intermediate,
        intermediate_size=size.dense_intermediate,
        mlp_only_layers=list(range(size.dense_layers)),
    )


def _mixtral(size: ModelSize) -> Any:
    return transformers.MixtralConfig(
        **_common(_all_sparse(size)), **_heads(), num_local_experts=size.experts, intermediate_size=size.intermediate
    )


def _gpt_oss(size: ModelSize) -> Any:
    return transformers.GptOssConfig(
        **_common(_all_sparse(size)), **_heads(), num_local_experts=size.experts, intermediate_size=size.intermediate
    )


def _aria(size: ModelSize) -> Any:
    return transformers.AriaTextConfig(
        **_common(_all_sparse(size)) | {"num_experts_per_tok": None},
        **_heads(),
        moe_num_experts=size.experts,
        moe_topk=size.top_k,
        moe_num_shared_experts=1,
        intermediate_size=size.intermediate,
    )


def _gemma4(size: ModelSize) -> Any:
    return transformers.Gemma4TextConfig(
        **_common(_all_sparse(size)),
        **_heads(),
        enable_moe_block=True,
        num_experts=size.experts,
        top_k_experts=size.top_k,
        moe_intermediate_size=size.intermediate,
        intermediate_size=size.dense_intermediate,
        hidden_size_per_layer_input=0,
    )


def _nemotron_h(size: ModelSize) -> Any:
    return transformers.NemotronHConfig(
        **_common(size) | {"num_hidden_layers": None},
        **_heads(),
        n_routed_experts=size.experts,
        moe_intermediate_size=size.intermediate,
        moe_shared_expert_intermediate_size=size.intermediate,
        intermediate_size=size.dense_intermediate,
        layers_block_type=["full_attention"] * size.dense_layers + ["moe"] * size.moe_layers,
    )


def _deepseek_v3(size: ModelSize) -> Any:
    return transformers.DeepseekV3Config(
        **_common(size),
        num_key_value_heads=4,
        n_routed_experts=size.experts,
        moe_intermediate_size=size.intermediate,
        intermediate_size=size.dense_intermediate,
        first_k_dense_replace=size.dense_layers,
        n_group=1,
        topk_group=1,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=HEAD_DIM,
        num_nextn_predict_layers=0,
    )


def _all_sparse(size: ModelSize) -> ModelSize:
    """Families that have experts in every layer."""
    if size.dense_layers:
        raise ConfigError(f"dense_layers is {size.dense_layers}; every layer of this family has experts: it must be 0")
    return size


RECIPES = {
    "minimax_m3_vl": CheckpointRecipe(_minimax_m3, (Checkpoint.MXFP8, Checkpoint.BF16)),
    "minimax_m3_vl_text": CheckpointRecipe(model_config, (Checkpoint.BF16, Checkpoint.MXFP8)),
    "qwen3_moe": CheckpointRecipe(_qwen3_moe, (Checkpoint.BF16, Checkpoint.BLOCK_FP8)),
    "mixtral": CheckpointRecipe(_mixtral, (Checkpoint.BF16,)),
    "deepseek_v3": CheckpointRecipe(_deepseek_v3, (Checkpoint.BLOCK_FP8, Checkpoint.BF16)),
    "gpt_oss": CheckpointRecipe(_gpt_oss, (Checkpoint.MXFP4, Checkpoint.BF16)),
    "aria_text": CheckpointRecipe(_aria, (Checkpoint.BF16,)),
    "gemma4_text": CheckpointRecipe(_gemma4, (Checkpoint.BF16,)),
    "nemotron_h": CheckpointRecipe(_nemotron_h, (Checkpoint.BF16,)),
}
"""Model type -> its recipe. minimax_m3_vl has a tensor a matrix, its text model alone transformers' stacks."""


@checks_enums
def make_checkpoint(
    folder: Path,
    family: str,
    form: Checkpoint,
    size: ModelSize,
    seed: int = 0,
    shard_bytes: int = 10**9,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> int:
    """Write a checkpoint that transformers loads.

    Args:
        folder: is made; must not be there.
        family: a key of `RECIPES`.
        form: one of the family's formats.
        size: H a multiple of 64; of 128 and I too for block FP8, else I of 32.
        seed: of the weights.
        shard_bytes: of a file, about; one file is written where everything fits.
        on_bytes: told how many bytes were written, after each file.

    Returns:
        Bytes of all tensors.

    Raises:
        ConfigError: family, form or size is not possible, or the folder can't be made.
    """
    if family not in RECIPES:
        raise ConfigError(f"family is {family!r:.40}; it must be one of {', '.join(RECIPES)}")
    recipe = RECIPES[family]
    if form not in recipe.formats:
        known = ", ".join(one.value for one in recipe.formats)
        raise ConfigError(f"format is {form.value}; checkpoints of {family} are made in {known}")
    _check_size(form, size)
    check_output_folder(folder, "the folder")
    if os.path.lexists(folder):
        raise ConfigError(f"the folder {folder} exists; give a new one")
    with _new_folder(folder) as work:
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(seed)
            config = recipe.config(size)
            build = (
                transformers.AutoModelForImageTextToText
                if family == "minimax_m3_vl"
                else transformers.AutoModelForCausalLM
            )
            model = build.from_config(config, dtype=torch.bfloat16)
            _fill_biases(model)
            model.save_pretrained(work)
        plain = {name: tensor for file in work.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for file in [*work.glob("*.safetensors"), *work.glob("*.index.json")]:
            file.unlink()
        tensors = plain if form is Checkpoint.BF16 else dict(_quantized(plain, form))
        _write_tensors(work, tensors, shard_bytes, on_bytes)
        if form is not Checkpoint.BF16:
            _write_quantization(work, form, plain, tensors)
        for file in work.iterdir():
            sync(file)
    return sum(tensor.nbytes for tensor in tensors.values())


@torch.no_grad()
def _fill_biases(model: torch.nn.Module) -> None:
    """Give experts' biases numbers in place of transformers' zeros, which nobody would miss."""
    for name, parameter in model.named_parameters():
        if _BIAS.fullmatch(name):
            parameter.normal_(std=BIAS_STD)


def _check_size(form: Checkpoint, size: ModelSize) -> None:
    hidden, width = (BLOCK, BLOCK) if form is Checkpoint.BLOCK_FP8 else (64, GROUP)
    for letter, value, step in (("H", size.hidden, hidden), ("I", size.intermediate, width)):
        if value % step:
            raise ConfigError(f"{letter} is {value}; in {form.value} it must be a multiple of {step}")
    if size.top_k > size.experts:
        raise ConfigError(f"K is {size.top_k}, more than E={size.experts}")


_EXPERT = re.compile(r".*\.experts\.(?:\d+\.\w+\.weight|gate_up_proj|down_proj)")
_BIAS = re.compile(r".*\.experts\.(?:gate_up|down)_proj_bias")
_LINEAR = re.compile(r".*_proj(?:_with_mqa)?\.weight")


def _quantized(plain: Mapping[str, torch.Tensor], form: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in plain.items():
        is_linear = form is Checkpoint.BLOCK_FP8 and _LINEAR.fullmatch(name)
        if not _EXPERT.fullmatch(name) and not is_linear:
            yield name, tensor
        elif form is Checkpoint.MXFP4:
            blocks, scales = _mxfp4(tensor.mT)  # [E, K, N] in BF16
            yield f"{name}_blocks", blocks
            yield f"{name}_scales", scales
        else:
            stack = tensor if tensor.dim() == 3 else tensor[None]
            made = MXFP8.quantize(stack) if form is Checkpoint.MXFP8 else BlockFP8.quantize(stack, BlockScale.AMAX)
            yield name, made.values.view(tensor.shape)
            yield f"{name}_scale_inv", made.scales if tensor.dim() == 3 else made.scales[0]


def _mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[.., N, K]`` as gpt-oss' blocks ``[.., N, K/32, 16]`` and scale bytes: the nearest E2M1 number of each."""
    wide = weight.float()
    groups = wide.reshape(*wide.shape[:-1], -1, GROUP)
    largest = groups.abs().amax(-1).clamp(min=2.0**-100)
    scales = (largest.frexp().exponent - 1 - 2 + 127).to(torch.uint8)  # 2 is E2M1's largest exponent
    scaled = groups / decode_scales(scales, torch.float32)[..., None]
    numbers = torch.tensor(E2M1)
    codes = torch.bucketize(scaled.abs().contiguous(), (numbers[1:] + numbers[:-1]) / 2)
    codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales


def _write_tensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], shard_bytes: int, on_bytes: Callable[[int], None]
) -> None:
    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].contiguous() for name in names}, folder / file, {"format": "pt"})
        on_bytes(sum(tensors[name].nbytes for name in names))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_quantization(
    folder: Path, form: Checkpoint, plain: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Say in config.json what was quantised, as the real checkpoints of the format do."""
    kept = sorted(
        name.removesuffix(".weight")
        for name, tensor in plain.items()
        if name.endswith(".weight") and name in tensors and f"{name}_scale_inv" not in tensors and tensor.dim() == 2
    )
    words: dict[Checkpoint, dict[str, Any]] = {
        Checkpoint.MXFP8: {
            "quant_method": "mxfp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [1, GROUP],
            "scale_fmt": "ue8m0",
            "ignored_layers": kept,
        },
        Checkpoint.BLOCK_FP8: {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": kept,
        },
        Checkpoint.MXFP4: {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_atomic(path, json.dumps(config | {"quantization_config": words[form]}, indent=2) + "\n")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` that gets its name when the block ends: whole, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.parent / f".{folder.name[:40]}.{secrets.token_hex(8)}"
    work.mkdir()
    try:
        yield work
        os.rename(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    sync(folder.parent)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and its advice about small models."""
    log = logging.getLogger("transformers")
    before = log.level
    log.setLevel(logging.ERROR)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        log.setLevel(before)
        if bars:
            transformers.utils.logging.enable_progress_bar()
