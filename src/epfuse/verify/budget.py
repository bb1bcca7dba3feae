"""How far a result may be from the float64 oracle, derived from where the paths round; and how far it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# A path that keeps the activations' dtype rounds to it five times: both accumulators of the first GEMM (gate and up),
# the activation, the weighted second GEMM, the sum over routes. The sigmoid passes the gate's rounding on once more.
ROUNDINGS = 6
# A path with FP8 activations rounds twice more, and those roundings are all that counts. The hidden rows' is passed on
# by gate, up and sigmoid.
FP8_ROUNDINGS = 3 + 1
# Root mean square of E4M3's relative rounding error: a number x in [1, 2) is off by up to 1/16, uniformly, whatever x
# is; averaged over numbers that are spread evenly in log x.
E4M3_ERROR = math.sqrt((1 / 8) ** 2 / 12 * 3 / (8 * math.log(2)))
# Twice the derived root mean square, for the worst token of a run; more where rows are short (`margin_db`).
MARGIN_DB = 6.0
# How rare a row may be whose own numbers happen to be so small that its error looks large.
RARE = 1e-6
LEAST_SIZE = 16
"""Of H and I. Below, a row of few numbers can be so small by chance that no budget tells a bug from bad luck."""
# One element's error, in root mean squares of its token's: with the margin 12 sigma of a typical token.
PEAK = 6.0


@dataclass(frozen=True)
class Tolerance:
    """What a case must reach.

    Attributes:
        snr_db: the least signal-to-noise ratio of any token's row, in decibels.
        max_error: the most that one element may be off, in root mean squares of its token's row.
        relative_error: the most that the whole call may be off, as a ratio of Euclidean norms.
    """

    snr_db: float
    max_error: float
    relative_error: float


@dataclass(frozen=True)
class Difference:
    """How a result compares with its oracle.

    Attributes:
        snr_db: the worst token's signal-to-noise ratio in decibels; ``inf`` if nothing differs.
        max_error: the worst element, in root mean squares of its token's row of the oracle.
        relative_error: Euclidean norm of the error over that of the oracle, NaN where both are NaN left out.
    """

    snr_db: float
    max_error: float
    relative_error: float

    def within(self, tolerance: Tolerance) -> bool:
        """Whether all figures are good enough."""
        return (
            self.snr_db >= tolerance.snr_db
            and self.max_error <= tolerance.max_error
            and self.relative_error <= tolerance.relative_error
        )


def dense_tolerance(dtype: torch.dtype, hidden: int, intermediate: int, sums: int = 0) -> Tolerance:
    """The budget of a path that keeps weights and activations in ``dtype`` and accumulates in FP32.

    Rounding to a unit roundoff u leaves a relative error of at most u, u / sqrt(3) in the root mean square if it is
    uniform. Independent roundings add in power, and so do the H + I additions of the two FP32 accumulations. What must
    not pass stays out of reach: a token that lost one of its K routes is below 20 dB, a dot product that lost one of
    6144 terms below 38 dB.

    Args:
        dtype: of weights and activations.
        hidden: H.
        intermediate: I.
        sums: roundings after the layer's own, where ranks' results are added.
    """
    rounding = torch.finfo(dtype).eps / 2
    accumulation = torch.finfo(torch.float32).eps / 2
    relative = math.sqrt((ROUNDINGS * rounding**2 + (hidden + intermediate) * accumulation**2) / 3)
    relative = after_sums(relative, dtype, sums)
    # of I products of two numbers few are large
    return _with_margin(relative, margin_db(min(hidden, intermediate // 2)))


def after_sums(relative: float, dtype: torch.dtype, sums: int) -> float:
    """A relative error after ``sums`` more roundings to ``dtype``, which add to it in power.

    A rank's share is as precise as the layer on one rank; what adds the shares rounds once more, or several times.
    """
    return math.sqrt(relative**2 + sums * (torch.finfo(dtype).eps / 2) ** 2 / 3)


def margin_db(elements: int) -> float:
    """What a row of so many numbers needs: its error does not shrink when the numbers happen to be small.

    The sum of squares of n numbers of unit variance is below x with probability (x/2)^(n/2) / Gamma(n/2 + 1): the
    leading term of the chi-squared distribution near 0. That x which is as likely as `RARE` is the smallest row of a
    run. From some 70 numbers on the ordinary margin covers it.
    """
    smallest = 2 * math.exp((math.log(RARE) + math.lgamma(elements / 2 + 1)) * 2 / elements)
    return max(MARGIN_DB, -10 * math.log10(smallest / elements))


def fp8_tolerance() -> Tolerance:
    """The budget of a path that rounds its activations to E4M3, with a scale per 32 or 128 of them.

    The noise of a dot product's inputs is that of its output: the terms' errors are independent. Everything that the
    path rounds to BF16 besides is some fifteen times smaller and disappears in the margin. A token that lost one of
    its K routes is below 20 dB and does not always fail here, but one of several does.
    """
    return _with_margin(math.sqrt(FP8_ROUNDINGS) * E4M3_ERROR)


def _with_margin(relative: float, margin: float = MARGIN_DB) -> Tolerance:
    relative *= 10 ** (margin / 20)
    return Tolerance(snr_db=-20 * math.log10(relative), max_error=PEAK * relative, relative_error=relative)


def compare(result: torch.Tensor, oracle: torch.Tensor) -> Difference:
    """Token by token, so that a long call can't hide one wrong row.

    Args:
        result: ``[T, H]``, any floating dtype.
        oracle: ``[T, H]`` float64. Where it is NaN the result must be NaN, and nowhere else; where a whole row is zero
            the result must be exactly zero.
    """
    both_nan = result.isnan() & oracle.isnan()
    expected = oracle.masked_fill(both_nan, 0.0)
    error = (result.double() - oracle).masked_fill(both_nan, 0.0).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    signal = expected.square().mean(dim=1)
    noise = error.square().mean(dim=1)
    wrong = noise > 0
    if not bool(wrong.any()):
        return Difference(math.inf, 0.0, 0.0)
    snr = 10 * torch.log10(signal[wrong] / noise[wrong])
    peak = error[wrong].amax(dim=1) / signal[wrong].sqrt()
    # inf/inf and 0/0 come from a NaN in the oracle's own finite rows: no agreement at all
    return Difference(
        float(snr.nan_to_num(nan=-math.inf, neginf=-math.inf).min()),
        float(peak.nan_to_num(nan=math.inf, posinf=math.inf).max()),
        float((noise.sum() / signal.sum()).sqrt().nan_to_num(nan=math.inf, posinf=math.inf)),
    )
