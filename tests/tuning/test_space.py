"""The search space: tiles that the kernels can take, a bounded number of them, in an order that is always the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import TypeAdapter

from epfuse import Path, Target
from epfuse.config import LayerShape, WeightFormat
from epfuse.families import blocks
from epfuse.families.family import CallKind, Stage
from epfuse.families.portable import PORTABLE
from epfuse.families.registry import serving
from epfuse.families.sm90 import SM90
from epfuse.families.sm90_fp8 import SM90_FP8
from epfuse.families.sm90_packed import SM90_PACKED
from epfuse.measured.schema import TileEntry
from epfuse.policy import READABLE
from epfuse.stages.tiles import GemmTile, LayerTiles, Sm90DenseTile, Sm90PersistentTile, Sm90Tile
from epfuse.tuning.space import block_ms, candidates, known_candidates
from tests.tuning.tables import M3

FRAGMENT = (SM90, SM90_PACKED)
HOPPER = CallKind(Path.W8A16, Target.SM90, M3, frozenset({WeightFormat.FRAGMENT}))
GPUS = [target for target in Target if target.is_gpu]
ENTRIES: TypeAdapter[GemmTile] = TypeAdapter(TileEntry)
KINDS = [(target, path, form) for target in GPUS for path, forms in READABLE[target].items() for form in forms]


@pytest.mark.parametrize(("target", "path", "form"), KINDS)
@pytest.mark.parametrize("rows", [0.03, 2.0, 32.0, 256.0])
def test_candidates_are_valid_distinct_and_few(target: Target, path: Path, form: object, rows: float) -> None:
    kind = CallKind(path, target, M3, frozenset({form}))
    families = serving(kind)
    for block_m in block_ms(families, rows):
        for stage in Stage:
            tiles = candidates(kind, families, stage, block_m, rows)
            assert 4 <= len(tiles) == len(set(tiles)) <= 120
            assert tiles == candidates(kind, families, stage, block_m, rows)
            for tile in tiles:
                LayerTiles(block_m, tile, tile)
                assert ENTRIES.validate_json(ENTRIES.dump_json(tile)) == tile
                if path in (Path.W8A8, Path.BLOCK_FP8):
                    assert tile.block_k % 128 == 0
                if isinstance(tile, Sm90PersistentTile) and form is WeightFormat.ROW_FP8:
                    assert (tile.block_k, tile.parts) == (128, 1)
                elif isinstance(tile, Sm90PersistentTile) and not isinstance(tile, Sm90DenseTile):
                    assert (tile.block_n, tile.num_warps) == (128 if block_m >= 256 else 192, 4)


@pytest.mark.parametrize(
    ("rows", "least", "expected"),
    [(0.03, 8, [8]), (4.0, 8, [8, 16]), (5.0, 16, [16, 32]), (20.0, 16, [16, 32, 64]), (300.0, 8, [64, 128])],
)
def test_row_blocks_are_around_the_rows_of_an_expert(rows: float, least: int, expected: list[int]) -> None:
    assert blocks.powers_of_two(rows, least) == expected
    assert max(blocks.powers_of_two(1e9, least)) == blocks.LARGEST


SEVERAL = [144, 160, 192, 256, 272, 288, 320]
"""Where an expert takes several blocks, rows decide which size leaves the least padding."""


def of_two_parts(sizes: list[int]) -> list[int]:
    """Without the powers of two that every family tries."""
    return [size for size in sizes if size > blocks.LARGEST or size.bit_count() > 1]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(8.0, []), (32.0, [96]), (64.0, [96]), (128.0, [144, 160, 192]), (140.0, SEVERAL[:-2]), (1e9, SEVERAL)],
)
def test_blocks_of_two_parts_are_a_little_larger_than_the_rows(rows: float, expected: list[int]) -> None:
    assert of_two_parts(SM90_PACKED.block_ms(rows)) == expected


@pytest.mark.parametrize(("rows", "expected"), [(8.0, []), (64.0, [96]), (128.0, [144, 160, 192]), (1e9, SEVERAL[:-1])])
def test_blocks_of_fp8_rows_leave_registers_for_two_sums(rows: float, expected: list[int]) -> None:
    assert of_two_parts(SM90_FP8.block_ms(rows)) == expected


@pytest.mark.parametrize(("rows", "blocks"), [(32.0, {(64, 32), (96, 32)}), (64.0, {(96, 32), (128, 64)})])
def test_blocks_with_room_for_skew_are_tried(rows: float, blocks: set[tuple[int, int]]) -> None:
    found = {
        (block_m, tile.head)
        for block_m in block_ms(FRAGMENT, rows)
        for tile in candidates(HOPPER, FRAGMENT, Stage.DOWN, block_m, rows)
        if isinstance(tile, Sm90PersistentTile)
    }
    assert blocks <= found
    assert not {48, 80} & {block_m for block_m, _ in found}


@pytest.mark.parametrize(("shape", "widths"), [(M3, {192}), (LayerShape(6144, 16384, 8, 1, 2), {128, 192})], ids=str)
def test_only_layers_with_few_tiles_get_narrow_ones_of_whole_steps(shape: LayerShape, widths: set[int]) -> None:
    kind = CallKind(Path.W8A16, Target.SM90, shape, frozenset({WeightFormat.FRAGMENT}))
    tiles = [tile for block_m in (96, 144, 192) for tile in SM90_PACKED.candidates(kind, block_m, 160.0)]
    assert {tile.block_n for tile in tiles} == widths
    assert {tile.block_k for tile in tiles} == {128}


def test_narrow_layers_get_narrow_tiles() -> None:
    narrow = replace(M3, hidden=64, intermediate=32)
    tiles = candidates(CallKind(Path.BF16, Target.GFX942, narrow), [PORTABLE], Stage.GATE_UP, 16, 1.0)
    assert max(tile.block_n for tile in tiles) == 64


SMALL = Sm90Tile(64, 128, 0, 4, 3, guess_bytes=512)
LARGE = Sm90PersistentTile(192, 128, 4, 4, 3, parts=1)


def test_known_tiles_run_at_every_block_that_takes_them() -> None:
    def at(block_m: int) -> list[GemmTile]:
        return known_candidates(HOPPER, [SMALL, LARGE], FRAGMENT, Stage.DOWN, block_m)

    alone = replace(SMALL, guess_bytes=0)
    assert at(8) == [alone]
    assert at(64) == [alone, LARGE]
    assert at(144) == [LARGE]
    assert at(160) == [LARGE]
    assert known_candidates(HOPPER, [replace(LARGE, num_stages=4)], FRAGMENT, Stage.DOWN, 160) == []
    shared = replace(alone, split_k=4)
    assert known_candidates(HOPPER, [shared], FRAGMENT, Stage.DOWN, 8) == [shared]
    assert known_candidates(HOPPER, [shared], FRAGMENT, Stage.DOWN, 128) == [shared]
    assert known_candidates(HOPPER, [shared], FRAGMENT, Stage.DOWN, 256) == []
    tailed = replace(alone, tail_split=4)
    assert known_candidates(HOPPER, [tailed], FRAGMENT, Stage.DOWN, 16) == [tailed]
    assert known_candidates(HOPPER, [tailed], FRAGMENT, Stage.DOWN, 64) == []
    for block_m in (8, 64, 144):
        for tile in at(block_m):
            LayerTiles(block_m, tile, tile)


def test_known_tiles_wider_than_the_layer_are_left_out() -> None:
    wide = GemmTile(256, 64, 0, 4, 3)
    narrow = replace(M3, hidden=128)
    assert known_candidates(CallKind(Path.BF16, Target.SM90, M3), [wide], [PORTABLE], Stage.DOWN, 16)[0] == wide
    assert known_candidates(CallKind(Path.BF16, Target.SM90, narrow), [wide], [PORTABLE], Stage.DOWN, 16) == []
    assert known_candidates(CallKind(Path.BF16, Target.SM90, M3), [wide], [PORTABLE], Stage.DOWN, 144) == []
