"""vLLM's tile files: ``E=16,N=3072,device_name=NVIDIA_H100_80GB_HBM3[,dtype=..][,block_shape=[128,128]].json``.

vLLM reads them from the folder that VLLM_TUNED_CONFIG_FOLDER names. A file maps token counts to one tile for both
GEMMs; E counts the experts of a rank, N is I. Form and file name: vllm/model_executor/layers/fused_moe,
get_config_file_name and get_moe_configs.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping

from epfuse.config import LayerShape
from epfuse.errors import ConfigError
from epfuse.input_file import read_object
from epfuse.report.write import write_atomic
from epfuse.stages.tiles import GemmTile, LayerTiles

ALL_BLOCKS = 1024
"""A GROUP_SIZE_M that no call's blocks exceed: what group_m 0 means."""
LARGEST = 1 << 20
"""No size of a tile is as large."""
SIZES = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
NAME = re.compile(r"E=([0-9]+),N=([0-9]+),device_name=([^,]+)(?:,.*)?\.json")
TOKENS = re.compile(r"[1-9][0-9]{0,8}")
NOTES = ("triton_version",)
"""Keys that are no token counts; vLLM leaves them out too."""


def file_name(shape: LayerShape, device_name: str) -> str:
    """What vLLM calls the file of a layer in BF16; other formats' names have ``,dtype=..`` behind it.

    Args:
        shape: the layer's sizes.
        device_name: the product, as torch names it.
    """
    return f"E={shape.local_experts},N={shape.intermediate},device_name={folded_name(device_name)}.json"


def folded_name(device_name: str) -> str:
    """A product as vLLM's files name it.

    Spaces become underscores, every H200 is one family (get_config_file_name), and a virtual function of an Instinct
    has the card's own name (vllm/platforms/rocm.py, _ROCM_DEVICE_ID_NAME_MAP).
    """
    name = re.sub(r"[\s/]+", "_", device_name)
    if "H200" in name.split("_"):
        return "NVIDIA_H200"
    return name.removesuffix("_VF") if name.startswith("AMD_Instinct_") else name


def read(path: pathlib.Path, shape: LayerShape) -> dict[int, LayerTiles]:
    """The tiles of a file, by token count.

    Args:
        path: the file; its name says which layer it is for.
        shape: the layer that it is to serve.

    Raises:
        ConfigError: the file is not one of vLLM's, or is for another layer.
    """
    named = NAME.fullmatch(path.name)
    if named is None:
        raise ConfigError(f"tile file {path} has no name of vLLM's form, E=..,N=..,device_name=...json")
    if (int(named[1]), int(named[2])) != (shape.local_experts, shape.intermediate):
        raise ConfigError(
            f"tile file {path} is for E={named[1]}, N={named[2]}; the layer has L={shape.local_experts},"
            f" I={shape.intermediate}"
        )
    found = {}
    for tokens, entry in read_object(path, "tile file").items():
        if tokens in NOTES:
            continue
        if TOKENS.fullmatch(tokens) is None:
            raise ConfigError(f"tile file {path} has the key {tokens!r}; it must be a token count")
        found[int(tokens)] = _tiles(path, entry)
    return found


def _tiles(path: pathlib.Path, entry: object) -> LayerTiles:
    block_m, block_n, block_k, group_m, warps, stages = (_size(path, entry, name) for name in SIZES)
    # Triton for AMD read 0 stages as what it now calls 2 (its backend's own message, third_party/amd, 3.2 to 3.4)
    tile = GemmTile(block_n, block_k, 0 if group_m >= ALL_BLOCKS else group_m, warps, stages or 2)
    return LayerTiles(block_m, tile, tile)


def _size(path: pathlib.Path, entry: object, name: str) -> int:
    value = entry.get(name) if isinstance(entry, dict) else None
    least = 0 if name == "num_stages" else 1
    if type(value) is not int or not least <= value < LARGEST:
        raise ConfigError(f"tile file {path}: {name} is {value!r}; it must be an integer, {least} to {LARGEST}")
    return value


def write(folder: pathlib.Path, name: str, tiles: Mapping[int, LayerTiles], triton: str) -> pathlib.Path:
    """Write a file that a stock vLLM reads; from calls whose two tiles differ it gets the first, of the larger GEMM.

    Args:
        folder: made if it is not there.
        name: from `file_name`.
        tiles: by token count; portable ones.
        triton: version that they were measured with.

    Raises:
        ConfigError: a tile is of a kernel that vLLM does not have.
    """
    content: dict[str, object] = {"triton_version": triton}
    for tokens, layer in sorted(tiles.items()):
        tile = layer.gate_up
        if type(tile) is not GemmTile:
            raise ConfigError(f"the tile at T={tokens} is a {type(tile).__name__}, of a kernel that vLLM does not have")
        group_m = tile.group_m or ALL_BLOCKS
        sizes = (layer.block_m, tile.block_n, tile.block_k, group_m, tile.num_warps, tile.num_stages)
        content[str(tokens)] = dict(zip(SIZES, sizes, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    return write_atomic(folder / name, json.dumps(content, indent=4) + "\n")
