"""Whether servers fit on their GPUs, alone or two side by side, said before one starts: vLLM takes two minutes."""

from __future__ import annotations

import csv
import math
import os
import re
from typing import Any

from tools.serve_on_gpu.arms import Workplace, last_option
from tools.serve_on_gpu.models import MODELS

from epfuse.errors import ConfigError
from epfuse.input_file import read_object
from epfuse.serving.node import answer
from epfuse.weights.model_config import model_of

GIB = 2**30
BESIDE = int(2.5 * GIB)
"""What a server holds of a GPU beside weights and cache. Seen on an H200, vLLM 0.25.1, in GiB: its context 0.7, what a
batch of 8192 tokens needs 1.1, graphs 0.7."""
DEFAULT_SHARE = "0.92"
"""Of a GPU's memory, which vLLM 0.25.1 takes unless it is told another."""
BF16_BYTES, MXFP8_BYTES = 2.0, 33 / 32
"""Of a weight; MXFP8's 32 codes share a scale of one byte."""
NUMBER = re.compile(r"\d*\.?\d+")
SHARE = re.compile(r"[01]?\.?\d+")
SIZE = re.compile(r"(?P<whole>\d+)(?P<binary>[KMGT]?)|(?P<number>\d+(?:\.\d+)?)(?P<decimal>[kmgt])")


def cache_bytes(text: str) -> int:
    """Bytes of ``--cache``, written as vLLM reads it: 1K is 1024, 1k is 1000, and only the latter takes decimals.

    Raises:
        ConfigError: vLLM would not read it.
    """
    match = SIZE.fullmatch(text)
    if match is None or not re.search("[1-9]", text):
        raise ConfigError(f"--cache is {text!r}; it must be a size as 12G or 9728M, or with decimals 9.5g")
    if match["whole"] is not None:
        return int(match["whole"]) * 1024 ** " KMGT".index(match["binary"] or " ")
    return int(float(match["number"]) * 1000 ** " kmgt".index(match["decimal"]))


def weight_bytes(place: Workplace) -> int:
    """Bytes of a model's weights on each of its GPUs, to within one percent if all have as many layers.

    A checkpoint's are those of its files, or half of them where vLLM makes 8 bits of 16 while it loads. What vLLM
    leaves in the host's memory does not count.
    """
    tensor, data, stages = (
        _ranks(place, f"--{kind}-parallel-size", f"-{kind[0]}p") for kind in ("tensor", "data", "pipeline")
    )
    quantizes = last_option(place.engine_arguments, "--quantization", "-q") is not None
    if place.model not in MODELS:
        every = _file_bytes(place) // (2 if quantizes and not _is_quantized(place) else 1) // (tensor * data)
    else:
        config = MODELS[place.model].config()
        experts = model_of(config, place.model)
        matrices = len(experts.moe_layers) * experts.experts * 3 * experts.hidden * experts.intermediate
        of_experts = matrices * (MXFP8_BYTES if quantizes or "quantization_config" in config else BF16_BYTES)
        every = int(of_experts / (tensor * data) + _others(config, len(experts.moe_layers)) * BF16_BYTES / tensor)
    return max(0, every // stages - _offloaded(place))


def _file_bytes(place: Workplace) -> int:
    """Of a checkpoint's tensors; files in Mistral's own form beside others hold the same ones."""
    sizes = {file.name: file.stat().st_size for file in place.folder.glob("*.safetensors")}
    own = sum(size for name, size in sizes.items() if name.startswith("consolidated"))
    return max(own, sum(sizes.values()) - own)


def _is_quantized(place: Workplace) -> bool:
    """Whether a checkpoint's own config.json says so."""
    path = place.folder / "config.json"
    return path.is_file() and "quantization_config" in read_object(path, "config.json")


def _offloaded(place: Workplace) -> int:
    """Bytes of a GPU's weights in the host's memory; none where the option has another value, which vLLM judges."""
    said = last_option(place.arguments, "--cpu-offload-gb") or ""
    return int(float(said) * GIB) if NUMBER.fullmatch(said) else 0


def _ranks(place: Workplace, *names: str) -> int:
    """How many an option asks for; 1 where it has another value, which vLLM judges."""
    said = last_option(place.arguments, *names) or ""
    return max(1, int(said)) if said.isdecimal() else 1


def _others(config: dict[str, Any], moe: int) -> int:
    """Weights outside the routed experts: embeddings in and out, attention, dense layers, shared experts."""
    hidden, heads, keys = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    attention = hidden * config["head_dim"] * (2 * heads + 2 * keys)
    layers = config["num_hidden_layers"]
    dense = (layers - moe) * 3 * hidden * config.get("dense_intermediate_size", config["intermediate_size"])
    shared = moe * config.get("n_shared_experts", 0) * 3 * hidden * config.get("shared_intermediate_size", 0)
    return int(2 * config["vocab_size"] * hidden + layers * attention + dense + shared)


def gpu_bytes() -> int | None:
    """Bytes of the smallest GPU that servers may use; None where nvidia-smi shows none."""
    query = ("nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits")
    rows = [[word.strip() for word in row] for row in csv.reader(answer(query, os.environ).splitlines())]
    seen = [(index, uuid, int(size)) for index, uuid, size in (row for row in rows if len(row) == 3) if size.isdigit()]
    asked = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    sizes = [size for index, uuid, size in seen if any(_is_named(word, index, uuid) for word in asked)]
    sizes = sizes or [size for _, _, size in seen]
    return min(sizes) * 2**20 if sizes else None


def _is_named(word: str, index: str, uuid: str) -> bool:
    """Whether a word of CUDA_VISIBLE_DEVICES is a GPU's: its index, or what its UUID begins with."""
    return word == index or (word.startswith("GPU-") and uuid.startswith(word))


def check_alone(place: Workplace) -> None:
    """Refuse a server whose weights leave no room for keys and values in its share of a GPU, before it is started.

    Args:
        place: where it runs, alone on its GPUs.

    Raises:
        ConfigError: there is none.
    """
    has, said = gpu_bytes(), last_option(place.engine_arguments, "--gpu-memory-utilization") or DEFAULT_SHARE
    if has is None or not SHARE.fullmatch(said) or last_option(place.arguments, "--kv-cache-memory-bytes") is not None:
        return  # vLLM judges the second, and follows the third alone
    need, gets = weight_bytes(place) + BESIDE, float(said) * has
    if need > gets:
        raise ConfigError(
            f"a server of {place.model} takes some {need / GIB:.1f} GiB of a GPU beside keys and values, and gets"
            f" {gets / GIB:.1f} of {has / GIB:.1f} (--gpu-memory-utilization {said}): spread it over more GPUs"
            " (--tensor-parallel), or give another share in --serve-arguments"
        )


def check_room(place: Workplace) -> None:
    """Refuse a pair of servers that can't fit on their GPUs, before one is started.

    Args:
        place: of both; its arguments say how much of a GPU the keys and values of each take.

    Raises:
        ConfigError: weights, keys and values of both are more than the GPU has; or the size of the latter can't be
            read.
    """
    cache = cache_bytes(last_option(place.arguments, "--kv-cache-memory-bytes") or "0")
    weights, has = weight_bytes(place), gpu_bytes()
    need = 2 * (weights + cache + BESIDE)
    if has is None or need <= has:
        return
    room = math.floor((has / 2 - weights - BESIDE) / GIB)
    way = f"--cache {room}G fits" if room > 0 else "no --cache fits: part serve starts servers one after the other"
    raise ConfigError(
        f"two servers of {place.model} side by side take some {need / GIB:.1f} GiB of a GPU that has {has / GIB:.1f}:"
        f" twice {weights / GIB:.1f} of weights, {cache / GIB:.1f} of keys and values and {BESIDE / GIB:.1f} beside"
        f" them; {way}"
    )
