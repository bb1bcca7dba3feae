"""Tables, trials and tile files from outside: read in full, or refused in our own words."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path as FilePath

import pytest

from epfuse import Path, Target
from epfuse.errors import ConfigError
from epfuse.measured import store
from epfuse.measured.schema import Stage
from epfuse.report import folder_lock
from epfuse.stages.tiles import GemmTile, LayerTiles, Sm90Tile
from epfuse.tuning import vllm_files
from epfuse.tuning.trials import plans_of, read_trials
from tests.mutations import mutated_bytes, mutated_values
from tests.tuning.tables import H200, M3, measurement, row, write

HOPPER = Sm90Tile(64, 128, 0, 4, 3)


def _fill(folder: FilePath) -> None:
    write(folder, measurement(row(1, 8, tile=HOPPER), row(64)), measurement(row(1), device=H200))


def _texts(valid: bytes, part: int, values: int = 80) -> Iterable[bytes]:
    yield from mutated_values(json.loads(valid), values, seed=part)
    yield from mutated_bytes(valid, 20, seed=part)


@pytest.mark.parametrize("part", range(3))
def test_a_mutated_table_is_read_in_full_or_refused(tmp_path: FilePath, part: int) -> None:
    _fill(tmp_path)
    path, read = store.table_path(tmp_path, Target.SM90, Stage.DOWN), 0
    for text in _texts(path.read_bytes(), part):
        path.write_bytes(text)
        with contextlib.suppress(ConfigError):
            for entry in store.read_table(tmp_path, Target.SM90, Stage.DOWN).measurements:
                for each in entry.rows:  # what a call makes of it
                    LayerTiles(each.block_m, each.tile, each.tile)
                    assert each.tokens / each.microseconds < float("inf")
            read += 1
    assert read > 3


@pytest.mark.parametrize("part", range(3))
def test_mutated_trials_are_read_in_full_or_refused(tmp_path: FilePath, part: int) -> None:
    tile = {"kind": "portable", "block_n": 64, "block_k": 128, "group_m": 0, "num_warps": 4, "num_stages": 2}
    valid = [{"path": "bf16", "tokens": count, "block_m": 16, "gate_up": tile, "down": tile} for count in (1, 64)]
    path, read = tmp_path / "trials.json", 0
    for text in _texts(json.dumps(valid).encode(), part):
        path.write_bytes(text)
        with contextlib.suppress(ConfigError):
            plans_of(read_trials(path), Target.SM90)
            read += 1
    assert read > 3


@pytest.mark.parametrize("part", range(3))
def test_a_mutated_tile_file_is_read_in_full_or_refused(tmp_path: FilePath, part: int) -> None:
    tile = GemmTile(64, 128, 8, 4, 2)
    tiles = {count: LayerTiles(16, tile, tile) for count in (1, 64)}
    path, read = vllm_files.write(tmp_path, vllm_files.file_name(M3, H200), tiles, "3.6.0"), 0
    for text in _texts(path.read_bytes(), part, values=250):
        path.write_bytes(text)
        with contextlib.suppress(ConfigError):
            assert all(count >= 1 for count in vllm_files.read(path, M3))
            read += 1
    assert read > 3


def _folder(path: FilePath) -> None:
    path.unlink()
    path.mkdir()


def _ring(path: FilePath) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(b"\xff\xfe{}"), "is wrong at the top"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "is wrong at the top"),
        (lambda path: path.write_text(path.read_text().replace('"block_n": 64', '"block_n": 65')), "power of two"),
        (lambda path: path.write_text(path.read_text().replace('"hidden": 6144', '"hidden": 0')), "hidden is 0"),
        (
            lambda path: path.write_text(path.read_text().replace('"roofline": 0.5', '"roofline": 1e999')),
            "roofline",
        ),
        (_folder, "Is a directory"),
        (_ring, "Too many levels"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: FilePath, damage: Callable[[FilePath], object], words: str) -> None:
    _fill(tmp_path)
    path = store.table_path(tmp_path, Target.SM90, Stage.DOWN)
    damage(path)
    for ask in (store.check_tables, lambda folder, target: write(folder, measurement(row(2)))):
        with pytest.raises(ConfigError, match=words) as caught:
            ask(tmp_path, Target.SM90)
        assert str(path) in str(caught.value)


KILLED = """\
import os, signal, sys
from pathlib import Path
from epfuse.report import write as writer
from tests.tuning.tables import measurement, row, write
left = int(sys.argv[2])
def dying(name, real):
    def step(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(os, name, step)
for name in ("fsync", "replace"):
    dying(name, getattr(os, name))
unlink = Path.unlink
dying("unlink", os.unlink)
Path.unlink = lambda self, missing_ok=False: os.unlink(self) if self.exists() or not missing_ok else None
write(Path(sys.argv[1]), measurement(row(1, 32), row(64, 32)))
"""


def test_a_merge_that_is_killed_at_any_step_loses_nothing(tmp_path: FilePath) -> None:
    """Before it every T has rows of one block_m in both tables; after the kill too, the old ones or the new ones."""
    steps, killed = 0, True
    while killed:
        folder = tmp_path / str(steps)
        write(folder, measurement(row(1), row(64), row(256)))
        child = os.fork()
        if child == 0:
            sys.argv = ["killed", str(folder), str(steps)]
            exec(compile(KILLED, "killed", "exec"), {})
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        tables = [store.read_table(folder, Target.SM90, stage) for stage in Stage]
        pairs = [{(each.tokens, each.block_m) for each in table.measurements[0].rows} for table in tables]
        assert pairs[0] == pairs[1]
        assert {tokens for tokens, _ in pairs[0]} == {1, 64, 256}
        write(folder, measurement(row(2)))
        assert sorted(os.listdir(folder / "sm_90")) == ["down.json", "gate_up.json"]
        (read,) = store.read_table(folder, Target.SM90, Stage.DOWN).measurements
        assert {each.tokens for each in read.rows} == {1, 2, 64, 256}
        steps += 1
    assert steps > 8
    assert {each.block_m for each in read.rows if each.tokens == 64} == {32}


def test_a_lock_that_another_holds_is_waited_for_with_a_limit(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(tmp_path)
    monkeypatch.setattr(folder_lock, "PATIENCE", 0.1)
    code = "import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), 2); print('.'); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / "sm_90")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(ConfigError, match="holds the lock on"):
            write(tmp_path, measurement(row(2)))
        holder.send_signal(signal.SIGKILL)
    write(tmp_path, measurement(row(2), path=Path.W8A8))
