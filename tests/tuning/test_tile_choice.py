"""tools/tile_choice.py --full, with a bench that knows which tile is best."""

from __future__ import annotations

import zlib
from typing import Any, ClassVar

import pytest
from tools import tile_choice
from tools.tile_choice import ASKED, M3, draw_counts, judge_full

from epfuse.families.family import Stage
from epfuse.measured.lookup import sources
from epfuse.stages.tiles import GemmTile, LayerTiles
from epfuse.target import Target
from epfuse.tuning.prune import TileCandidate
from epfuse.tuning.search import Timed, TuningPoint

DEVICE = "NVIDIA H200"


class FakeBench:
    """A stage's time follows from the tile's name, a call's from its stages'."""

    timed: ClassVar[set[tuple[int, Stage, int, GemmTile]]] = set()

    def __init__(self, *arguments: Any) -> None:
        self.weights = None

    def stage(self, point: TuningPoint, stage: Stage, block_m: int, tile: GemmTile) -> Timed:
        self.timed.add((point.tokens, stage, block_m, tile))
        return Timed(50.0 + zlib.crc32(f"{stage.value} {block_m} {tile.key}".encode()) % 97)

    def layer(self, point: TuningPoint, tiles: LayerTiles) -> Timed:
        parts = [self.stage(point, stage, tiles.block_m, getattr(tiles, stage.value)) for stage in Stage]
        return Timed(sum(part.microseconds for part in parts))

    def floor_us(self, point: TuningPoint, stage: Stage) -> float:
        return 40.0


def test_counts_are_drawn_by_the_fit_and_none_was_measured() -> None:
    counts = draw_counts(DEVICE, 12)
    assert counts == draw_counts(DEVICE, 12) == tuple(sorted(set(counts)))
    assert len(counts) == 12
    measured = {row.tokens for each in sources(Target.SM90, DEVICE, *ASKED, M3) for row in each.points}
    assert {1, 1024} <= measured
    assert not measured & set(counts)


def test_every_tile_that_compiles_is_timed_and_the_best_is_what_today_s_is_held_against(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dropped: list[TileCandidate] = []

    def unfit(candidates: list[TileCandidate], workers: int, progress: Any) -> dict[TileCandidate, str]:
        ours = {"64x128.g0.4w.4s", "64x128.g0.4w.3s", "128x128.g0.4w.4s"}
        dropped.extend(one for one in candidates if one.tile.key not in ours and one.tile.block_n == 128)
        return dict.fromkeys(dropped, "it spills")

    monkeypatch.setattr(tile_choice, "DeviceBench", FakeBench)
    monkeypatch.setattr(tile_choice, "unfit", unfit)
    monkeypatch.setattr(tile_choice, "draw_counts", lambda device, count: (14, 62)[:count])
    FakeBench.timed.clear()
    records: list[dict[str, Any]] = []
    judge_full(DEVICE, 2, 600.0, 1, lambda record: records.append(record | {"points": list(record["points"])}))
    assert [len(record["points"]) for record in records] == [1, 2]
    assert dropped
    spilt = {(one.stage, one.block_m, one.tile) for one in dropped}
    alone = {(stage, block_m, tile) for _, stage, block_m, tile in FakeBench.timed}
    today = {point["tiles"] for point in records[-1]["points"]}
    assert not {(stage, block_m, tile) for stage, block_m, tile in spilt & alone if tile.key not in "".join(today)}
    for point in records[-1]["points"]:
        assert point["untried"] == 0
        assert point["stage_timings"] >= 10
        assert point["over_best"] == pytest.approx(point["us"] / min(point["us"], point["best_us"]), abs=1e-4)
        assert point["best_us"] <= point["us"]
    assert max(point["over_best"] for point in records[-1]["points"]) > 1.0
