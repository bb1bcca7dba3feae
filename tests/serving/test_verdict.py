"""A/B: false verdicts stay below the level with drift and heavy tails, and the power is what docs/serving.md says."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from epfuse.serving.point import Compare
from epfuse.serving.verdict import (
    FLIP_PAIRS,
    Word,
    holm,
    judge,
    least_p,
    sign_flip_p,
    t_interval,
    t_p,
)

POINTS = 6
TOLD = (Word.FASTER, Word.SLOWER)


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (7, 2.365), (9, 2.262), (10, 2.228), (19, 2.093), (30, 2.042)],
)
def test_t_is_the_table_s(freedom: int, t: float) -> None:
    """Two-sided 5 % points of Student's t, as printed in any statistics book."""
    values = [1.0 + math.sin(7.0 * place) for place in range(freedom + 1)]
    error = statistics.stdev(values) / math.sqrt(len(values))
    low, high = t_interval(values, 0.05)
    half = (math.log1p(high) - math.log1p(low)) / 2
    assert half / error == pytest.approx(t, abs=6e-4)
    shifted = [value - statistics.fmean(values) + t * error for value in values]
    assert t_p(shifted) == pytest.approx(0.05, abs=2e-4)


def test_sign_flips_are_counted() -> None:
    assert sign_flip_p([1.0] * 8) == 2 / 2**8 == least_p(8)
    assert sign_flip_p([1.0] * 5) == 2 / 2**5 > 0.05  # which is why five pairs can never pass
    assert sign_flip_p([1.0, -1.0]) == 1.0
    assert sign_flip_p([3.0, 1.0, 1.0]) == 0.25
    assert sign_flip_p([1.0, -0.5] * 4) == pytest.approx(sign_flip_p([-1.0, 0.5] * 4))
    assert sign_flip_p([1.0] * 20) < 1e-4


def test_holm() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([0.05, 0.051, 0.049, 0.05, 0.05, 0.049, 0.051, 0.05], Word.FASTER),
        ([-0.05, -0.051, -0.049, -0.05, -0.05, -0.049, -0.051, -0.05], Word.SLOWER),
        ([0.001, -0.001] * 4, Word.SAME),
        ([0.005, 0.0051, 0.0049] * 3, Word.SAME),  # told apart, and by less than anyone cares
        ([0.2, -0.2, 0.1, -0.1] * 2, Word.OPEN),
        ([0.2, -0.2, 0.1, -0.1], Word.FEW),
        ([0.05, 0.05], Word.FEW),
        ([], Word.FEW),
        ([0.05, 0.051, 0.049, 0.0505], Word.FASTER),
    ],
)
def test_verdicts_in_words(values: list[float], word: Word) -> None:
    found = judge({"a": values}, Compare())["a"]
    assert found.word is word
    assert found.sentence.startswith(word.capitalize())
    assert (found.method == "sign flips") == (len(values) >= FLIP_PAIRS)


def test_eight_pairs_of_many_points_use_t_because_flips_could_never_pass() -> None:
    values = [0.05, 0.052, 0.048, 0.05, 0.051, 0.049, 0.05, 0.05]
    assert judge({str(n): values for n in range(6)}, Compare())["0"].method == "sign flips"
    many = judge({str(n): values for n in range(18)}, Compare())
    assert {verdict.method for verdict in many.values()} == {"t"}
    assert {verdict.word for verdict in many.values()} == {Word.FASTER}


def legs(draw: random.Random, pairs: int, noise: float, drift: float) -> list[float]:
    """Log ratios of a point without effect: heavy tails (Student's t of 3 degrees), a trend and a random walk."""
    trend, walk, values = drift * draw.uniform(-1, 1), 0.0, []
    for leg in range(2 * pairs):
        walk += draw.gauss(0.0, drift / 2)
        tail = draw.gauss(0, 1) / math.sqrt(draw.gammavariate(1.5, 2 / 3)) / math.sqrt(3)
        values.append(noise * tail + trend * leg + walk)
    return [(values[2 * k + 1] - values[2 * k]) * (-1 if k % 2 else 1) for k in range(pairs)]


def share(runs: int, pairs: int, noise: float, drift: float, effect: float, seed: int = 1) -> float:
    """Runs without effect in which any point is told apart; with one, points that are told to be faster."""
    draw = random.Random(seed)
    compare = Compare(least_effect=0.0)
    count = 0
    for _ in range(runs):
        ratios = {str(n): [x + math.log1p(effect) for x in legs(draw, pairs, noise, drift)] for n in range(POINTS)}
        words = [verdict.word for verdict in judge(ratios, compare).values()]
        count += words.count(Word.FASTER) if effect else any(word in TOLD for word in words)
    return count / runs / (POINTS if effect else 1)


@pytest.mark.parametrize("pairs", [4, 8])
@pytest.mark.parametrize("drift", [0.0, 0.01])
def test_without_effect_at_most_5_percent_of_runs_have_a_false_verdict(pairs: int, drift: float) -> None:
    """Family-wise, six points, least effect 0, with 3 standard errors of the simulation as margin."""
    runs = 400
    rate = share(runs, pairs, 0.01, drift, 0.0)
    assert rate <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


POWER = {(4, 0.01): 0.65, (8, 0.01): 0.98, (8, 0.02): 0.53}
"""(pairs, noise of a leg) -> share of points at which 3 % is found, as docs/serving.md states it."""


@pytest.mark.parametrize(("pairs", "noise"), [(4, 0.01), (8, 0.01), (8, 0.02)])
def test_power_at_3_percent(pairs: int, noise: float) -> None:
    assert share(60, pairs, noise, 0.0, 0.03) == pytest.approx(POWER[pairs, noise], abs=0.08)
