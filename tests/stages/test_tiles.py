"""What a tile may be."""

from __future__ import annotations

import pytest

from epfuse.errors import ConfigError
from epfuse.stages.tiles import GemmTile, LayerTiles, Sm90PersistentTile, Sm90Tile

PORTABLE = GemmTile(64, 128, 0, 4, 2)
HOPPER = Sm90Tile(64, 128, 0, 4, 4)
PERSISTENT = Sm90PersistentTile(192, 128, 4, 4, 3)


@pytest.mark.parametrize(
    ("block_m", "tile"),
    [(16, PORTABLE), (8, HOPPER), (128, HOPPER), (64, PERSISTENT), (80, PERSISTENT), (40, PERSISTENT)],
)
def test_row_blocks_that_kernels_take(block_m: int, tile: GemmTile) -> None:
    assert LayerTiles(block_m, tile, tile).block_m == block_m


@pytest.mark.parametrize(
    ("block_m", "tile", "message"),
    [
        (8, PORTABLE, "a power of two, none below 16"),
        (48, PORTABLE, "a power of two, none below 16"),
        (48, HOPPER, "a power of two, none below 8"),
        (4, HOPPER, "a power of two, none below 8"),
        (112, PERSISTENT, "the sum of at most two powers of two, none below 8"),
        (68, PERSISTENT, "the sum of at most two powers of two, none below 8"),
    ],
)
def test_other_row_blocks_are_refused(block_m: int, tile: GemmTile, message: str) -> None:
    with pytest.raises(ConfigError, match=f"block_m is {block_m}; it must be {message}"):
        LayerTiles(block_m, tile, tile)


@pytest.mark.parametrize("tiles", [(PERSISTENT, HOPPER), (HOPPER, PERSISTENT)])
def test_persistent_tiles_come_in_pairs(tiles: tuple[GemmTile, GemmTile]) -> None:
    with pytest.raises(ConfigError, match="both stages take a persistent tile, or neither"):
        LayerTiles(64, *tiles)


def test_persistent_tiles_have_one_width() -> None:
    with pytest.raises(ConfigError, match=r"down\.block_n is 256; a persistent tile's is 192"):
        LayerTiles(64, PERSISTENT, Sm90PersistentTile(256, 128, 4, 4, 3))
