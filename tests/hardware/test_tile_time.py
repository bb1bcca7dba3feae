"""The time model of tiles: what it counts is what the kernels do, and what was fitted is what it says."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from statistics import geometric_mean

import pytest

from epfuse.config import MINIMAX_M3_EP8, LayerShape, Path, WeightFormat
from epfuse.hardware.tile_time import call_us, columns_of, expert_rows, load_of
from epfuse.measured.fits import FitEntry, fit_of
from epfuse.stages.tiles import LayerTiles, Sm90PersistentTile, Sm90Tile
from epfuse.target import Target

ORDINARY = Sm90Tile(128, 128, 0, 4, 3)


def fitted(device: str = "NVIDIA H200") -> FitEntry:
    found = fit_of(Target.SM90, device, Path.W8A16, WeightFormat.FRAGMENT)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("block_m", "head"), [(32, 32), (96, 32), (96, 64), (128, 64), (144, 128), (160, 128), (272, 256), (320, 256)]
)
def test_persistent_blocks_are_multiplied_in_the_kernels_own_steps(block_m: int, head: int) -> None:
    persistent = pytest.importorskip("epfuse.stages.sm90_persistent")
    steps = persistent.column_steps
    steps = getattr(steps, "fn", steps)
    expected = tuple(sum(pair) for pair in steps(block_m, head))
    assert columns_of(block_m, head) == expected


@pytest.mark.parametrize(("tokens", "share"), [(1, 0.25), (7, 0.25), (40, 0.0625), (16, 1.0)])
def test_rows_of_an_expert_are_binomial(tokens: int, share: float) -> None:
    p = Fraction(share)
    for rows, probability in expert_rows(tokens, share):
        exact = math.comb(tokens, rows) * p**rows * (1 - p) ** (tokens - rows)
        assert probability == pytest.approx(float(exact), rel=1e-3)


@pytest.mark.parametrize("tokens", [64, 1000, 8192, 100_000])
def test_no_row_is_lost(tokens: int) -> None:
    load = load_of(32, ORDINARY, MINIMAX_M3_EP8, tokens)
    assert load.rows == pytest.approx(tokens * 4 / 128 * 16, rel=1e-3)
    counts = expert_rows(tokens, 4 / 128)
    assert sum(rows * probability for rows, probability in counts) == pytest.approx(tokens / 32, rel=1e-3)
    assert load.columns >= load.rows * 0.999
    assert load.blocks * 32 >= load.columns * 0.999


def test_a_call_of_one_token_has_at_least_one_expert() -> None:
    assert load_of(8, ORDINARY, replace(MINIMAX_M3_EP8, local_experts=1), 1).active == pytest.approx(1)


def test_rows_that_need_a_second_block_cost_what_it_takes() -> None:
    """144 rows an expert in blocks of 144 need two blocks as often as one; blocks of 320 multiply 256 rows at least."""
    times = fitted().times()

    def us(block_m: int, tile: Sm90PersistentTile, tokens: int) -> float:
        return call_us(times, LayerTiles.both(block_m, tile), MINIMAX_M3_EP8, tokens)

    small, large = Sm90PersistentTile(192, 128, 2, 4, 3, 1), Sm90PersistentTile(128, 64, 1, 4, 4)
    assert us(160, small, 4300) < 0.8 * us(320, large, 4300)
    assert us(320, large, 8192) < us(160, small, 8192)
    assert us(320, large, 4300) > 0.9 * us(320, large, 8192)  # almost as long


def test_a_last_wave_that_is_far_from_full_costs_more_than_its_bytes() -> None:
    times = fitted().times()
    shape = LayerShape(6144, 3072, 16, 16, 1)
    narrow = LayerTiles.both(8, Sm90Tile(64, 128, 0, 4, 4))
    each = [call_us(times, narrow, shape, tokens) for tokens in range(4, 40)]
    assert all(second >= first * 0.999 for first, second in pairwise(each))


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_the_stated_error_is_that_of_the_shipped_rows(device: str) -> None:
    from tools.fit_tiles import predicted, rows_of

    fit, rows = fitted(device), rows_of(device)
    errors = [math.log(predicted(fit.times(), row)[2] / row.layer) for row in rows]
    assert len(rows) == fit.points
    assert math.sqrt(sum(error * error for error in errors) / len(errors)) == pytest.approx(fit.error, abs=5e-4)
    assert fit.error < fit.error_other_shape < 0.1


def test_the_tiles_that_it_predicts_the_fastest_are_fast() -> None:
    """Of 32 to 80 pairs at each count of the records, slow ones of three times the time among them."""
    from tools.fit_tiles import tried_of

    times, points = fitted().times(), tried_of("NVIDIA H200")
    assert len(points) == 29
    over = []
    for point in points:
        predicted_us = {tiles: point.us(times, tiles) for tiles, _ in point.calls}
        chosen = min(predicted_us, key=lambda tiles: predicted_us[tiles])
        over.append(dict(point.calls)[chosen] / point.calls[0][1])
    assert max(over) <= 1.115
    assert geometric_mean(over) <= 1.018


def test_tiles_after_the_last_full_wave_are_quicker_shared() -> None:
    """8 active experts: 768 tiles of gate_up, 108 after the last wave of 660 programs."""
    times, shape = fitted().times(), LayerShape(6144, 3072, 8, 8, 1)
    alone = LayerTiles(8, Sm90Tile(64, 128, 0, 4, 4), Sm90Tile(128, 128, 0, 4, 3))
    shared = replace(alone, gate_up=replace(alone.gate_up, tail_split=4))
    assert call_us(times, shared, shape, 40) < 0.95 * call_us(times, alone, shape, 40)
