"""Baseline against candidate: an interval, a p value over all points of a run, and a verdict in words.

A pair is two servers that ran one after the other; its log ratio is log(candidate / baseline). Every second pair of a
job runs in the other order, so that drift adds to the noise and not to the mean.

- From 8 pairs on the test is sign flips: if the arms are equal, each log ratio may as well have the other sign. It
  assumes no distribution. With n pairs its least p value is 2 / 2**n, so that 5 pairs could never pass at 5 %.
- With fewer pairs, and where so few can't pass Holm's bound for the number of points, it is Student's t.
- Holm's procedure holds the probability of one false verdict in a run below the level, over all of its points.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from epfuse.serving.point import Compare

LEAST_PAIRS = 3
"""For a t interval that says anything at all."""
FLIP_PAIRS = 8
MOST_EXACT = 16
"""Pairs up to which all sign flips are counted; beyond, so many are drawn."""
DRAWN = 1 << 16


class Word(StrEnum):
    """What is said of a point."""

    FASTER = "faster"
    SLOWER = "slower"
    SAME = "the same"
    OPEN = "not told apart"
    FEW = "too few pairs to tell"


@dataclass(frozen=True)
class PointVerdict:
    """The comparison of one point.

    Attributes:
        word: the verdict.
        pairs: how many there are.
        effect, low, high: candidate / baseline - 1, and its interval at 1 - level; None without enough pairs.
        p, adjusted: of no effect, by itself and by Holm over the run's points; None without enough pairs.
        method: "sign flips" or "t"; None without enough pairs.
        sentence: all of it for people.
    """

    word: Word
    pairs: int
    effect: float | None
    low: float | None
    high: float | None
    p: float | None
    adjusted: float | None
    method: str | None
    sentence: str


def judge(ratios: Mapping[str, Sequence[float]], compare: Compare) -> dict[str, PointVerdict]:
    """The verdicts of a run.

    Args:
        ratios: point -> log ratios of its pairs, finite; higher is better.
        compare: least effect and level.
    """
    tested = {name: list(values) for name, values in ratios.items() if len(values) >= LEAST_PAIRS}
    bound = compare.level / max(len(tested), 1)
    flips = {name: len(values) >= FLIP_PAIRS and least_p(len(values)) <= bound for name, values in tested.items()}
    p = {name: sign_flip_p(values) if flips[name] else t_p(values) for name, values in tested.items()}
    adjusted = holm(p)
    found = {}
    for name, values in ratios.items():
        if name not in tested:
            words = f"{len(values)} pairs; {LEAST_PAIRS} are the least, {FLIP_PAIRS} are better."
            few = f"{Word.FEW.capitalize()}: {words}"
            found[name] = PointVerdict(Word.FEW, len(values), None, None, None, None, None, None, few)
            continue
        low, high = t_interval(values, compare.level)
        effect = math.expm1(statistics.fmean(values))
        word = _word(effect, low, high, adjusted[name], len(values), compare)
        method = "sign flips" if flips[name] else "t"
        sentence = (
            f"{word.capitalize()}: {effect:+.1%}, {1 - compare.level:.0%} interval {low:+.1%} to {high:+.1%}, "
            f"p = {adjusted[name]:.2g} over {len(tested)} points ({method}, {len(values)} pairs)."
        )
        found[name] = PointVerdict(word, len(values), effect, low, high, p[name], adjusted[name], method, sentence)
    return found


def _word(effect: float, low: float, high: float, adjusted: float, pairs: int, compare: Compare) -> Word:
    least = compare.least_effect
    if adjusted <= compare.level and abs(effect) >= least:
        return Word.FASTER if effect > 0 else Word.SLOWER
    if -least <= low and high <= least:
        return Word.SAME
    return Word.FEW if pairs < FLIP_PAIRS else Word.OPEN


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p values: comparing them with the level keeps the family-wise error rate."""
    found: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        found[name] = largest
    return found


def least_p(pairs: int) -> float:
    """The least p value that sign flips of so many pairs can give."""
    return 2.0 / 2**pairs if pairs <= MOST_EXACT else 2.0 / DRAWN


def sign_flip_p(values: Sequence[float]) -> float:
    """Two-sided p value of no effect: the share of sign flips whose sum is at least as far from 0."""
    total = abs(math.fsum(values))
    enough = total * (1 - 1e-12)
    if len(values) <= MOST_EXACT:
        sums = [values[0]]  # the other half has the other sign, and the same distance from 0
        for value in values[1:]:
            sums = [part + sign for part in sums for sign in (value, -value)]
        return sum(abs(one) >= enough for one in sums) / len(sums)
    draw = random.Random(0)
    far = 0
    for _ in range(DRAWN):
        signs = draw.getrandbits(len(values))
        far += abs(sum(value if signs >> place & 1 else -value for place, value in enumerate(values))) >= enough
    return (far + 1) / (DRAWN + 1)


def t_p(values: Sequence[float]) -> float:
    """Two-sided p value of no effect by Student's t."""
    error = _standard_error(values)
    mean = statistics.fmean(values)
    if error == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    return max(0.0, 1.0 - _within(abs(mean) / error, len(values) - 1))


def t_interval(values: Sequence[float], level: float) -> tuple[float, float]:
    """Relative effect's interval at 1 - level."""
    mean, half = statistics.fmean(values), _t_quantile(1.0 - level, len(values) - 1) * _standard_error(values)
    return math.expm1(mean - half), math.expm1(min(mean + half, 700.0))


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def _within(t: float, freedom: int) -> float:
    """Probability of [-t, t] under Student's t with ``freedom`` degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if freedom % 2 else (1.0, 0.0)
    for step in range(freedom // 2):
        total += term
        odd = 2 * step + 1
        term *= cosine**2 * ((odd + 1) / (odd + 2) if freedom % 2 else odd / (odd + 1))
    return 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total


def _t_quantile(within: float, freedom: int) -> float:
    low, high = 0.0, 1.0
    while _within(high, freedom) < within:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < within else (low, middle)
    return high
