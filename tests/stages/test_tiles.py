"""What a tile may be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from epfuse.errors import ConfigError
from epfuse.stages.sm90_persistent import column_steps
from epfuse.stages.tiles import GemmTile, LayerTiles, Sm90PersistentTile, Sm90Tile

PORTABLE = GemmTile(64, 128, 0, 4, 2)
HOPPER = Sm90Tile(64, 128, 0, 4, 4)
PERSISTENT = Sm90PersistentTile(192, 128, 4, 4, 3)
WIDE = Sm90PersistentTile(128, 64, 1, 4, 5)
SPARE = Sm90PersistentTile(192, 128, 4, 4, 3, head=64)


@pytest.mark.parametrize(
    ("block_m", "tile"),
    [
        *((16, PORTABLE), (8, HOPPER), (128, HOPPER)),
        *((size, PERSISTENT) for size in (40, 64, 80)),
        *((size, SPARE) for size in (64, 80, 128, 192)),
    ],
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
        (8, PERSISTENT, "the sum of at most two powers of two, none below 8, or one alone, at least 16"),
        (68, PERSISTENT, "the sum of at most two powers of two, none below 8"),
        (0, PERSISTENT, "the sum of at most two powers of two, none below 8"),
        (-64, PERSISTENT, "the sum of at most two powers of two, none below 8"),
        (48, SPARE, "the sum of 64 and one more, none below 8"),
        (160, SPARE, "the sum of 64 and one more, none below 8"),
        (68, SPARE, "the sum of 64 and one more, none below 8"),
    ],
)
def test_other_row_blocks_are_refused(block_m: int, tile: GemmTile, message: str) -> None:
    with pytest.raises(ConfigError, match=f"block_m is {block_m}; it must be {message}"):
        LayerTiles(block_m, tile, tile)


@pytest.mark.parametrize("tiles", [(PERSISTENT, HOPPER), (HOPPER, PERSISTENT), (PERSISTENT, WIDE)])
def test_a_persistent_tile_is_both_stages(tiles: tuple[GemmTile, GemmTile]) -> None:
    with pytest.raises(ConfigError, match="such a tile must be both stages'"):
        LayerTiles(64, *tiles)


def test_three_consumers_have_no_registers_for_many_rows() -> None:
    assert LayerTiles(288, WIDE, WIDE).block_m == 288
    with pytest.raises(ConfigError, match="block_m is 288; with three consumers it must be below 256"):
        LayerTiles(288, PERSISTENT, PERSISTENT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((256, 128, 4, 4, 3), "block_n is 256; a persistent tile's is 128 or 192"),
        ((192, 32, 4, 4, 3), "block_k is 32 and parts 2"),
        ((192, 64, 4, 4, 3, 1), "block_k is 64 and parts 1"),
        ((192, 128, 4, 4, 3, 3), "block_k is 128 and parts 3"),
        ((192, 128, 4, 4, 3, 1, 48), "head is 48; a persistent tile's is a power of two, at least 8, or 0"),
        ((192, 128, 4, 4, 3, 1, -64), "head is -64"),
    ],
)
def test_persistent_tiles_that_do_not_exist(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sm90PersistentTile(*arguments)


@pytest.mark.parametrize(
    ("block_m", "head", "totals"),
    [
        (48, 32, [32, 48]),
        (64, 64, [32, 64]),
        (96, 64, [64, 96]),
        (96, 32, [32, 48, 64, 96]),
        (128, 64, [64, 80, 96, 128]),
        (72, 64, [64, 72]),
        (320, 256, [64, 256, 272, 288, 320]),
    ],
)
def test_columns_go_up_to_the_block(block_m: int, head: int, totals: list[int]) -> None:
    steps = column_steps(block_m, head)
    assert [sum(step) for step in steps] == totals
    assert all(first <= head and rest <= block_m - head for first, rest in steps)


@pytest.mark.parametrize("changes", [{"block_k": 64, "parts": 2}, {"parts": 2}])
def test_tiles_of_fp8_rows_have_whole_stages(changes: dict[str, int]) -> None:
    pytest.importorskip("triton")
    from epfuse.stages.sm90_launch import check_fp8_tile

    tile = Sm90PersistentTile(192, 128, 0, 4, 4, parts=1)
    check_fp8_tile(tile)
    with pytest.raises(ConfigError, match="it must have block_k 128 and 1 part"):
        check_fp8_tile(replace(tile, **changes))
