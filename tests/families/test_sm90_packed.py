"""Default tiles for many MXFP8 rows an expert, beside all that a run on an H200 tried."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path as File

import pytest

pytest.importorskip("triton")

from pydantic import TypeAdapter

from epfuse.config import LayerShape, Path, WeightFormat
from epfuse.families.family import CallKind
from epfuse.families.registry import default_ranges
from epfuse.measured.schema import TileEntry
from epfuse.stages.tiles import GemmTile, LayerTiles, Sm90PersistentTile, has_few_tiles, rows_per_expert
from epfuse.target import Target

RECORD = json.loads((File(__file__).parents[2] / "docs/records/2026-12-01-h200-many-rows.json").read_text())
MANY = [point for point in RECORD["points"] if rows_per_expert(point["tokens"], LayerShape(**point["shape"])) > 64]
ENTRY: TypeAdapter[GemmTile] = TypeAdapter(TileEntry)


def spelled_out(tiles: LayerTiles) -> LayerTiles:
    """With the rows of the head, where the tile leaves them to the block."""
    if not isinstance(tiles.gate_up, Sm90PersistentTile):
        return tiles
    head, _ = tiles.gate_up.rows_of(tiles.block_m)
    return LayerTiles.both(tiles.block_m, replace(tiles.gate_up, head=head))


@pytest.mark.parametrize("point", MANY, ids=lambda point: f"{point['layer']}-{point['tokens']}")
def test_defaults_are_near_the_best_that_was_tried(point: dict) -> None:  # type: ignore[type-arg]
    """At every count of the record they were tried: within 9 % of the best, with one wide expert or two within 26 %."""
    shape = LayerShape(**point["shape"])
    tiles = [ENTRY.validate_python(tile) for tile in RECORD["tiles"]]
    times = {spelled_out(LayerTiles(block_m, tiles[up], tiles[down])): us for block_m, up, down, us in point["calls"]}
    kind = CallKind(Path.W8A16, Target.SM90, shape, frozenset({WeightFormat.FRAGMENT}), device_name="without rows")
    rows = rows_per_expert(point["tokens"], shape)
    default = next(entry.tiles for entry in default_ranges(kind) if rows <= entry.max_rows)
    assert times[spelled_out(default)] <= (1.26 if has_few_tiles(shape) else 1.09) * min(times.values())


def test_the_record_has_rows_of_every_range() -> None:
    for few in (False, True):
        shapes = [(LayerShape(**point["shape"]), point["tokens"]) for point in MANY]
        kinds = [(shape, tokens) for shape, tokens in shapes if has_few_tiles(shape) is few]
        ranges = default_ranges(
            CallKind(
                Path.W8A16, Target.SM90, kinds[0][0], frozenset({WeightFormat.FRAGMENT}), device_name="without rows"
            )
        )
        ends = [entry.max_rows for entry in ranges if entry.max_rows > (64 if few else 140)]
        begins = [64 if few else 140, *ends]
        seen = [rows_per_expert(tokens, shape) for shape, tokens in kinds]
        empty = [end for begin, end in zip(begins, ends, strict=False) if not any(begin < rows <= end for rows in seen)]
        assert empty == ([float("inf")] if few else [])
