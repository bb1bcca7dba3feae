"""The comparison sees one wrong row of many; the budgets are what they are derived to be."""

from __future__ import annotations

import math

import pytest
import torch

from epfuse.config import Path, WeightFormat
from epfuse.errors import ConfigError
from epfuse.stages.quantize.reference import quantize
from epfuse.verify.budget import (
    E4M3_ERROR,
    LEAST_SIZE,
    MARGIN_DB,
    compare,
    dense_tolerance,
    fp8_tolerance,
    margin_db,
)
from epfuse.verify.problem import Problem
from epfuse.verify.scenarios import draw_scenario
from epfuse.verify.subject import Stored, Subject, subjects_of
from epfuse.verify.suite import TRUE_SIZE_LIMITS, run, tolerance_of

CPU = torch.device("cpu")
ORACLE = torch.randn(300, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_equal() -> None:
    assert compare(ORACLE.clone(), ORACLE).snr_db == math.inf
    assert compare(ORACLE.clone(), ORACLE).max_error == 0


def test_one_wrong_row_decides() -> None:
    result = ORACLE.clone()
    result[7] *= 1.1
    assert compare(result, ORACLE).snr_db == pytest.approx(20)


def test_one_wrong_element_shows_in_the_max_error() -> None:
    result = ORACLE.clone()
    result[7, 3] += ORACLE[7].square().mean().sqrt() / 4
    assert compare(result, ORACLE).max_error == pytest.approx(0.25)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_fails(value: float) -> None:
    result = ORACLE.clone()
    result[7, 3] = value
    assert compare(result, ORACLE).snr_db == -math.inf
    assert compare(result, ORACLE).max_error == math.inf


def test_nan_is_right_exactly_where_the_oracle_has_it() -> None:
    oracle = ORACLE.clone()
    oracle[7] = math.nan
    assert compare(oracle.clone(), oracle).snr_db == math.inf
    assert compare(ORACLE, oracle).snr_db == -math.inf


def test_a_row_that_must_be_zero_must_be_exactly_zero() -> None:
    oracle = ORACLE.clone()
    oracle[7] = 0
    result = oracle.clone()
    assert compare(result, oracle).snr_db == math.inf
    result[7, 3] = 1e-30
    assert compare(result, oracle).snr_db == -math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_minimax_m3s_budget_notices_one_lost_term(dtype: torch.dtype) -> None:
    """A dot product over H=6144 that drops one term is off by 1/sqrt(6144): 37.9 dB."""
    assert dense_tolerance(dtype, 6144, 3072).snr_db > 37.9


def test_the_relative_error_is_that_of_the_whole_call() -> None:
    result = ORACLE.clone()
    result[7] *= 1.1
    assert compare(result, ORACLE).relative_error == pytest.approx(0.1 * float(ORACLE[7].norm() / ORACLE.norm()))
    result[8] = math.nan
    assert compare(result, ORACLE).relative_error == math.inf


def test_e4m3s_noise_is_what_the_budget_takes_it_for() -> None:
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    measured = float((quantize(x).dequantize() - x).norm() / x.norm())
    assert measured == pytest.approx(E4M3_ERROR, rel=0.02)


def test_fp8s_budget_notices_a_wrong_scale() -> None:
    """One group of 32 in H=6144 with half its scale is off by 1/2 * sqrt(32/6144): 28.9 dB, below the noise.

    So scales are tested where they are applied (tests/stages/test_fp8_gemms.py); what the budget must see is a scale
    that is wrong in every group.
    """
    tolerance = fp8_tolerance()
    assert 18 < tolerance.snr_db < 22
    assert tolerance.relative_error < 0.5


def test_short_rows_get_a_wider_margin_and_ordinary_ones_do_not() -> None:
    assert margin_db(3072) == margin_db(80) == MARGIN_DB
    widths = [margin_db(size) for size in (8, 16, 32, 64, 80)]
    assert widths == sorted(widths, reverse=True)
    # the rule against draws: of 2**16 rows of 8 numbers none is smaller than the margin allows, and some come near it
    rows = torch.randn(2**16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).square().mean(1)
    least_db = float(-10 * torch.log10(rows.min()))
    assert margin_db(8) - 6 < least_db < margin_db(8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_smallest_sizes_raise_no_false_alarm(dtype: torch.dtype) -> None:
    for seed in range(3):
        problem = Problem(LEAST_SIZE, LEAST_SIZE, 4, 2, 2, (1, 3, 37), dtype, torch.device("cpu"), seed)
        record = run(problem, subjects_of(problem, "reference"))
        assert not [case.failures for case in record.cases if not case.ok]


@pytest.mark.parametrize("size", ["hidden", "intermediate"])
@pytest.mark.parametrize("value", [1, 2, 3, LEAST_SIZE - 1])
def test_sizes_that_no_budget_can_judge_are_refused(size: str, value: int) -> None:
    sizes = {"hidden": 32, "intermediate": 32} | {size: value}
    with pytest.raises(ConfigError, match=f"{size} is {value}; to be verified it must be at least {LEAST_SIZE}"):
        Problem(**sizes, experts=2, top_k=1, ep_size=1, tokens=(1,), dtype=torch.float32, device=CPU, seed=0)


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("seed", range(4))
def test_a_sum_over_ranks_may_round_once_more_and_lose_nothing(tokens: int, seed: int) -> None:
    """Shares as noisy as was measured at MiniMax-M3's true size (docs/numerics.md), rounded, added, rounded."""
    problem = Problem(6144, 3072, 128, 4, 2, (tokens,), torch.bfloat16, CPU, seed)
    scenario = draw_scenario(problem, tokens, "uniform", seed)
    subject = Subject(Path.W8A16, Stored.MXFP8, WeightFormat.MXFP8)
    share, total = (tolerance_of(problem, subject, scenario, sums) for sums in (0, 1))
    assert share.relative_error == TRUE_SIZE_LIMITS[Path.W8A16]
    assert total.relative_error == pytest.approx(math.sqrt(4e-3**2 + 2**-16 / 3))

    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    routes = scenario.topk_weights.double().T[:, :, None] * draw(4, tokens, 6144)  # two on each rank
    noisy = routes * (1 + 3.4e-3 * draw(4, tokens, 6144))

    def summed(of_routes: torch.Tensor) -> torch.Tensor:
        first, second = (part.sum(0).bfloat16().float() for part in (of_routes[:2], of_routes[2:]))
        return (first + second).bfloat16()

    oracle = routes.sum(0)
    right = compare(summed(noisy), oracle)
    assert right.within(total)
    assert right.relative_error > share.relative_error  # what was taken for a fault on two H200s
    token = tokens // 2
    least = int(scenario.topk_weights[token].argmin())
    lost, doubled = noisy.clone(), noisy.clone()
    lost[least, token] = 0
    doubled[least, token] += scenario.topk_weights[token, least] * draw(6144)  # another bias of unit variance
    for wrong in (lost, doubled, noisy[:2].repeat(2, 1, 1), torch.cat([noisy[:2], 0 * noisy[2:]])):
        assert not compare(summed(wrong), oracle).within(total)
