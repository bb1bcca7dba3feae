"""Compiled resources: a tile that spills or does not fit is dropped without a GPU, a good one is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path as FilePath

import pytest

from epfuse import LayerShape, Path, Target
from epfuse.config import Bias, WeightFormat
from epfuse.families.family import Stage
from epfuse.stages.tiles import GemmTile, Sm90PersistentTile
from epfuse.tuning import prune
from epfuse.tuning.prune import TileCandidate, candidates_of, distinct, unfit
from epfuse.tuning.run import Device, TuningRequest, plan_of
from tests import jobs
from tests.tuning.tables import M3

GOOD = TileCandidate(
    target=Target.GFX942,
    path=Path.BF16,
    weights=WeightFormat.DENSE,
    shape=LayerShape(hidden=512, intermediate=256, experts=8, local_experts=4, top_k=2),
    tokens=16,
    stage=Stage.GATE_UP,
    block_m=16,
    tile=GemmTile(64, 128, 0, 4, 2),
)


def test_tiles_are_dropped_by_their_resources() -> None:
    pytest.importorskip("triton")
    huge = replace(GOOD, block_m=128, tile=GemmTile(256, 256, 0, 4, 2))
    seen: list[tuple[int, int]] = []
    found = unfit([GOOD, huge], 1, lambda done, total: seen.append((done, total)))
    assert set(found) == {huge}
    assert "bytes" in found[huge] or "spilled" in found[huge] or "Error" in found[huge] or "Out" in found[huge]
    assert seen == [(1, 2), (2, 2)]


def test_a_tile_whose_compiler_dies_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "shortfall", jobs.killed)
    assert "memory is short" in unfit([GOOD], 1, lambda done, total: None)[GOOD]


@pytest.mark.parametrize(("path", "weights"), [(Path.W8A16, WeightFormat.FRAGMENT), (Path.W8A8, WeightFormat.ROW_FP8)])
def test_persistent_tiles_have_one_launch_for_both_stages_or_one_for_each(path: Path, weights: WeightFormat) -> None:
    pytest.importorskip("triton")
    tile = Sm90PersistentTile(192, 128, 0, 4, 3, parts=1)
    wanted = [
        replace(GOOD, target=Target.SM90, path=path, weights=weights, stage=stage, block_m=32, tile=tile)
        for stage in Stage
    ]
    assert len(distinct(wanted)) == (1 if weights is WeightFormat.FRAGMENT else 2)
    assert unfit(wanted, 1, lambda done, total: None) == {}


def test_each_tile_is_compiled_once_for_all_token_counts(tmp_path: FilePath) -> None:
    device = Device(Target.GFX942, "AMD Instinct MI300X", "2.11.0", "3.7.1")
    request = TuningRequest(device, M3, (Path.BF16,), (64, 128), tmp_path, "epfuse tune")
    plans = [plan_of(request, point) for point in request.points()]
    tries = [candidate for plan in plans for candidate in candidates_of(request, plan)]
    found = distinct(tries)
    what = [(c.stage, c.block_m, c.tile) for c in found]
    assert len(tries) == sum(plan.steps for plan in plans)
    assert len(what) == len(set(what)) < len(tries)
    assert set(what) == {(c.stage, c.block_m, c.tile) for c in tries}
    biased = replace(request, bias=Bias.ADDED)
    with_biases = distinct(one for plan in plans for one in candidates_of(biased, plan))
    assert len(distinct([*tries, *with_biases])) == 2 * len(found)  # other code


@pytest.mark.parametrize(
    ("change", "alike"),
    [
        ({"local_experts": 2}, True),
        ({"hidden": 1024}, True),
        ({"hidden": 512 + 64}, False),
        ({"hidden": 512 + 128}, True),
        ({"intermediate": 32}, False),
        ({"top_k": 4}, False),
    ],
)
def test_layers_share_code_if_the_same_steps_divide_them(change: dict[str, int], alike: bool) -> None:
    other = replace(GOOD, shape=replace(GOOD.shape, **change))
    assert (other.code == GOOD.code) is alike
    assert len(distinct([GOOD, other, GOOD])) == (1 if alike else 2)
