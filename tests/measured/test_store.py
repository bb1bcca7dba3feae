"""Tables on disk: what is accepted, what is refused by name, and that no writer loses another one's rows."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path as FilePath

import pytest
from pydantic import ValidationError

from epfuse import Path, Target
from epfuse.errors import ConfigError
from epfuse.families.family import Stage
from epfuse.measured import store
from epfuse.measured.schema import TileTable
from epfuse.stages.tiles import GemmTile, Sm90PersistentTile, Sm90Tile
from tests.tuning.tables import H200, measurement, row, write

TILES = [
    GemmTile(64, 128, 0, 4, 2),
    Sm90Tile(64, 128, 0, 4, 4, split_k=8, guess_bytes=512),
    Sm90PersistentTile(192, 128, 4, 4, 3, parts=4),
    Sm90PersistentTile(192, 128, 4, 4, 3, head=64),
]


@pytest.mark.parametrize("tile", TILES)
def test_every_kind_of_tile_survives_the_disk(tmp_path: FilePath, tile: GemmTile) -> None:
    write(tmp_path, measurement(row(1, block_m=64, tile=tile)))
    (read,) = store.read_table(tmp_path, Target.SM90, Stage.DOWN).measurements
    assert read.rows[0].tile == tile
    assert type(read.rows[0].tile) is type(tile)


def test_a_table_that_is_not_there_is_empty(tmp_path: FilePath) -> None:
    assert store.read_table(tmp_path, Target.GFX942, Stage.DOWN).measurements == ()


def test_new_rows_replace_those_of_their_token_count_and_leave_the_others(tmp_path: FilePath) -> None:
    write(tmp_path, measurement(row(1, 16), row(1, 32), row(64)), measurement(row(1, 64, 5.0)))
    (read,) = store.read_table(tmp_path, Target.SM90, Stage.GATE_UP).measurements
    assert [(r.tokens, r.block_m) for r in read.rows] == [(1, 64), (64, 16)]


def test_older_rows_keep_their_command(tmp_path: FilePath) -> None:
    """Once each, however often the new command has written."""
    write(tmp_path, measurement(row(1), source="one"), *(measurement(row(n), source="two") for n in (16, 64)))
    (read,) = store.read_table(tmp_path, Target.SM90, Stage.GATE_UP).measurements
    assert read.source == "two; before: one"
    write(tmp_path, measurement(row(1), row(16), row(64), source="three"))
    (read,) = store.read_table(tmp_path, Target.SM90, Stage.GATE_UP).measurements
    assert read.source == "three"


def test_rows_of_other_versions_do_not_stay_under_the_new_ones(tmp_path: FilePath) -> None:
    write(tmp_path, measurement(row(64)), measurement(row(1), triton="3.7.1"))
    (read,) = store.read_table(tmp_path, Target.SM90, Stage.GATE_UP).measurements
    assert [r.tokens for r in read.rows] == [1]


def test_devices_and_shapes_stand_side_by_side(tmp_path: FilePath) -> None:
    write(tmp_path, measurement(row(1)), measurement(row(1), device=H200), measurement(row(1), path=Path.W8A8))
    assert len(store.read_table(tmp_path, Target.SM90, Stage.GATE_UP).measurements) == 3


def test_a_row_is_a_line(tmp_path: FilePath) -> None:
    write(tmp_path, measurement(row(1), row(64)))
    text = store.table_path(tmp_path, Target.SM90, Stage.DOWN).read_text()
    assert sum('"tokens"' in line for line in text.splitlines()) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version"),
        ({"stage": "gate_up"}, "is of sm_90, gate_up"),
        ({"target": "gfx942"}, "is of gfx942, down"),
        ({"note": "x"}, "note"),
        ({"measurements": [{"device": "x"}]}, "measurements.0"),
    ],
)
def test_a_wrong_file_is_named_with_the_place(tmp_path: FilePath, changes: dict[str, object], words: str) -> None:
    write(tmp_path, measurement(row(1)))
    path = store.table_path(tmp_path, Target.SM90, Stage.DOWN)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=words) as caught:
        store.read_table(tmp_path, Target.SM90, Stage.DOWN)
    assert str(path) in str(caught.value)


def test_a_tile_that_does_not_say_its_kind_is_refused(tmp_path: FilePath) -> None:
    write(tmp_path, measurement(row(1)))
    path = store.table_path(tmp_path, Target.SM90, Stage.DOWN)
    table = json.loads(path.read_text())
    del table["measurements"][0]["rows"][0]["tile"]["kind"]
    path.write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=r"measurements\.0\.rows\.0\.tile"):
        store.read_table(tmp_path, Target.SM90, Stage.DOWN)


def test_what_a_measurement_can_not_be() -> None:
    with pytest.raises(ValidationError, match="ascend"):
        measurement(row(64), row(1))
    with pytest.raises(ValidationError, match="ascend"):
        measurement(row(1), row(1))
    with pytest.raises(ValidationError, match="has no tiles"):
        measurement(row(1), path=Path.AUTO)
    with pytest.raises(ValidationError, match="must be one"):
        TileTable(target=Target.SM90, stage=Stage.DOWN, measurements=(measurement(row(1)), measurement(row(2))))
    with pytest.raises(ValidationError, match="microseconds"):
        row(1, microseconds=0.0)


def _write_counts(folder: FilePath, counts: list[int]) -> None:
    for tokens in counts:
        write(folder, measurement(row(tokens)))


def test_several_ranks_lose_no_rows(tmp_path: FilePath) -> None:
    spawn = multiprocessing.get_context("spawn")
    counts = [list(range(first, 41, 2)) for first in (1, 2)]
    ranks = [spawn.Process(target=_write_counts, args=(tmp_path, part)) for part in counts]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    (read,) = store.read_table(tmp_path, Target.SM90, Stage.DOWN).measurements
    assert [r.tokens for r in read.rows] == list(range(1, 41))


def test_a_writer_that_fails_leaves_the_old_table(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, measurement(row(1)))
    before = store.table_path(tmp_path, Target.SM90, Stage.GATE_UP).read_text()

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("epfuse.report.write.os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, measurement(row(2)))
    assert store.table_path(tmp_path, Target.SM90, Stage.GATE_UP).read_text() == before
    assert not list((tmp_path / "sm_90").glob(".gate_up*"))


@pytest.mark.parametrize("target", list(Target))
@pytest.mark.parametrize("stage", list(Stage))
def test_the_shipped_tables_are_right(target: Target, stage: Stage) -> None:
    table = store.read_table(store.TABLES, target, stage)
    for entry in table.measurements:
        assert entry.shape.hidden % 32 == 0
        assert all(r.roofline is None or r.roofline <= 1.0 for r in entry.rows)
        other = store.read_table(store.TABLES, target, next(s for s in Stage if s is not stage))
        assert entry.key in {m.key for m in other.measurements}
