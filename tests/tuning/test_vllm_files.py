"""vLLM's tile files: their names, reading, writing, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path as FilePath

import pytest

from epfuse.errors import ConfigError
from epfuse.stages.tiles import GemmTile, LayerTiles, Sm90Tile
from epfuse.tuning import vllm_files
from tests.tuning.tables import H100, M3

ENTRY = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 64,
    "BLOCK_SIZE_K": 128,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 4,
    "waves_per_eu": 0,
}
NAME = "E=16,N=3072,device_name=NVIDIA_H100_80GB_HBM3.json"


def put(tmp_path: FilePath, content: object, name: str = NAME) -> FilePath:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_name_is_vllms() -> None:
    assert vllm_files.file_name(M3, H100) == NAME


@pytest.mark.parametrize("name", [NAME, NAME.replace(".json", ",dtype=fp8_w8a8,block_shape=[128,128].json")])
def test_reading(tmp_path: FilePath, name: str) -> None:
    path = put(tmp_path, {"triton_version": "3.6.0", "1": ENTRY, "64": ENTRY | {"BLOCK_SIZE_M": 64}}, name)
    tile = GemmTile(64, 128, 1, 4, 4)
    assert vllm_files.read(path, M3) == {1: LayerTiles(16, tile, tile), 64: LayerTiles(64, tile, tile)}


def test_what_is_written_is_read_again(tmp_path: FilePath) -> None:
    first, second = GemmTile(64, 128, 0, 4, 2), GemmTile(128, 64, 8, 8, 3)
    tiles = {64: LayerTiles(64, second, first), 1: LayerTiles(16, first, first)}
    path = vllm_files.write(tmp_path / "new", NAME, tiles, "3.6.0")
    assert vllm_files.read(path, M3) == {1: LayerTiles(16, first, first), 64: LayerTiles(64, second, second)}
    content = json.loads(path.read_text())
    assert list(content) == ["triton_version", "1", "64"]
    assert set(content["1"]) == set(vllm_files.SIZES)
    assert content["1"]["GROUP_SIZE_M"] >= 1


def test_hopper_tiles_are_not_vllms(tmp_path: FilePath) -> None:
    tile = Sm90Tile(64, 128, 0, 4, 3)
    with pytest.raises(ConfigError, match="Sm90Tile, of a kernel that vLLM does not have"):
        vllm_files.write(tmp_path, NAME, {1: LayerTiles(8, tile, tile)}, "3.6.0")


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ({"1": ENTRY}, "tiles.json", "no name of vLLM's form"),
        ({"1": ENTRY}, NAME.replace("16", "32"), "is for E=32, N=3072"),
        ("{", NAME, "is not JSON"),
        ([], NAME, "is a list"),
        ({"1": {}}, NAME, "BLOCK_SIZE_M is None"),
        ({"1": ENTRY | {"num_warps": 0}}, NAME, "num_warps is 0"),
        ({"1": ENTRY | {"num_stages": -1}}, NAME, "num_stages is -1"),
        ({"1": ENTRY | {"num_warps": 10**30}}, NAME, "num_warps is 10"),
        ({"²": ENTRY}, NAME, "has the key '²'"),
        ({"0": ENTRY}, NAME, "has the key '0'"),
        ({"batch": ENTRY}, NAME, "has the key 'batch'"),
        ({"1": ENTRY}, NAME.replace("16", "\N{FULLWIDTH DIGIT ONE}6"), "no name of vLLM's form"),
        ({"1": 3}, NAME, "BLOCK_SIZE_M is None"),
        ({"1": ENTRY | {"BLOCK_SIZE_M": 24}}, NAME, "block_m is 24"),
    ],
)
def test_what_is_refused(tmp_path: FilePath, content: object, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        vllm_files.read(put(tmp_path, content, name), M3)


@pytest.mark.parametrize(
    ("device", "folded"),
    [
        ("NVIDIA H200", "NVIDIA_H200"),
        ("NVIDIA H200 NVL", "NVIDIA_H200"),
        ("NVIDIA GH200 480GB", "NVIDIA_GH200_480GB"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA_H100_80GB_HBM3"),
        ("NVIDIA RTX PRO 6000 Blackwell / Max-Q", "NVIDIA_RTX_PRO_6000_Blackwell_Max-Q"),
        ("AMD Instinct MI300X", "AMD_Instinct_MI300X"),
        ("AMD Instinct MI300X VF", "AMD_Instinct_MI300X"),
    ],
)
def test_families_are_folded_as_vllm_does(device: str, folded: str) -> None:
    assert vllm_files.file_name(M3, device) == f"E=16,N=3072,device_name={folded}.json"


def test_no_stages_are_what_triton_then_meant(tmp_path: FilePath) -> None:
    tile = GemmTile(64, 128, 1, 4, 2)
    assert vllm_files.read(put(tmp_path, {"1": ENTRY | {"num_stages": 0}}), M3) == {1: LayerTiles(16, tile, tile)}


def test_a_folder_is_no_tile_file(tmp_path: FilePath) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(ConfigError, match="Is a directory"):
        vllm_files.read(tmp_path / NAME, M3)
