"""The time model: its arithmetic, its calibration, and the published points that it has to reproduce."""

from __future__ import annotations

from dataclasses import replace

import pytest

from epfuse.aot.predict import predictions, published
from epfuse.config import MINIMAX_M3_EP8, LayerShape
from epfuse.errors import ConfigError
from epfuse.hardware.h100 import FITTED_TOKENS, H100, h100
from epfuse.hardware.published import BF16_POINTS, MOE_LAYERS
from epfuse.hardware.time_model import (
    BALANCED,
    MI300X,
    MI300X_ROUTING,
    PATHS,
    PROFILED_BF16,
    Kernels,
    MeasuredTime,
    RoutingModel,
    calibrate,
    compare,
    expert_gemms,
    mean_error,
    predicted_ms,
)

MEASURED = [
    MeasuredTime(point.name, PROFILED_BF16, point.tokens, point.expert_gemms_ms, MOE_LAYERS) for point in BF16_POINTS
]
ENDS = [measurement for measurement in MEASURED if measurement.tokens != 16]


def test_published_points() -> None:
    """BF16 within 20 % at c256 and 35 % at c1 and c16; block FP8 within 20 %."""
    for comparison in published():
        name = comparison.measurement.name
        assert abs(comparison.error) < (0.20 if "c256" in name else 0.35), (name, comparison.error)


def test_eta_and_launch_time_come_from_the_ends() -> None:
    """c1 is nearly all launches and c256 nearly all bytes; c16 and block FP8 were not used."""
    fitted = calibrate(MI300X, MINIMAX_M3_EP8, ENDS, MI300X_ROUTING)
    assert fitted.eta == pytest.approx(MI300X.eta, rel=0.03)
    assert fitted.launch_seconds == pytest.approx(MI300X.launch_seconds, rel=0.03)
    assert mean_error(compare(fitted, MINIMAX_M3_EP8, ENDS, MI300X_ROUTING)) < 0.03


def test_h100_points() -> None:
    """Our own measurements: fitted where memory is the bound, and no better than a roofline where compute is."""
    comparisons = h100()
    fitted = [c for c in comparisons if c.measurement.tokens <= FITTED_TOKENS]
    again = calibrate(H100, MINIMAX_M3_EP8, [c.measurement for c in fitted])
    assert again.eta == pytest.approx(H100.eta, rel=0.01)
    assert again.launch_seconds == pytest.approx(H100.launch_seconds, rel=0.03)
    assert mean_error(fitted) < 0.02
    assert mean_error(comparisons) < 0.10
    assert all(c.error > -0.30 for c in comparisons)


def test_a_balanced_router_can_not_explain_c16() -> None:
    """Why there is a skew at all."""
    fitted = calibrate(MI300X, MINIMAX_M3_EP8, ENDS, BALANCED)
    worst = max(c.error for c in compare(fitted, MINIMAX_M3_EP8, MEASURED, BALANCED) if c.measurement.tokens == 16)
    assert worst > 0.6


def test_calibration_finds_what_made_the_times() -> None:
    true = replace(MI300X, eta=0.8, launch_seconds=3e-6)
    made = [
        MeasuredTime(str(t), PATHS["bf16"], t, predicted_ms(true, PATHS["bf16"], MINIMAX_M3_EP8, t)) for t in (1, 8, 64)
    ]
    fitted = calibrate(MI300X, MINIMAX_M3_EP8, made)
    assert fitted.eta == pytest.approx(0.8)
    assert fitted.launch_seconds == pytest.approx(3e-6)
    with pytest.raises(ConfigError, match="can't be told apart"):
        calibrate(MI300X, MINIMAX_M3_EP8, made[:1])


@pytest.mark.parametrize("skew", [0.0, 0.7, 1.2, 3.0])
def test_inclusion_probabilities_sum_to_top_k(skew: float) -> None:
    chosen = RoutingModel(skew).inclusion(MINIMAX_M3_EP8)
    assert sum(chosen) == pytest.approx(4)
    assert all(0 < p <= 1 for p in chosen)
    assert chosen == sorted(chosen, reverse=True)


def test_active_experts() -> None:
    assert BALANCED.active_experts(MINIMAX_M3_EP8, 1) == pytest.approx(0.5)
    assert BALANCED.active_experts(MINIMAX_M3_EP8, 16) == pytest.approx(16 * (1 - (1 - 1 / 32) ** 16))
    assert MI300X_ROUTING.active_experts(MINIMAX_M3_EP8, 16) < BALANCED.active_experts(MINIMAX_M3_EP8, 16)
    everything = LayerShape(hidden=64, intermediate=64, experts=4, local_experts=4, top_k=4)
    assert BALANCED.active_experts(everything, 1) == 4


def test_bytes_and_flops_of_a_stage() -> None:
    """All 16 experts, one block each: weights once, rows in and out, padded products."""
    gate_up, down = expert_gemms(MI300X, PATHS["bf16"], MINIMAX_M3_EP8, 512)
    active = BALANCED.active_experts(MINIMAX_M3_EP8, 512)
    assert gate_up.bytes == pytest.approx(active * 2 * 3072 * 6144 * 2 + 256 * (6144 + 3072) * 2)
    assert down.bytes == pytest.approx(active * 3072 * 6144 * 2 + 256 * (3072 + 6144) * 2)
    blocks = 256 / 16 + active / 2
    assert gate_up.flops == pytest.approx(2 * blocks * 16 * 2 * 3072 * 6144)
    assert gate_up.bound == "memory"


def test_what_a_stage_waits_for() -> None:
    base = PATHS["w8a16"]
    assert expert_gemms(MI300X, base, MINIMAX_M3_EP8, 1)[0].bound == "launch"
    assert expert_gemms(MI300X, replace(base, vector_clocks=(9.0, 9.0)), MINIMAX_M3_EP8, 256)[0].bound == "vector"
    assert expert_gemms(MI300X, replace(base, block_m=128), MINIMAX_M3_EP8, 8192)[0].bound == "matrix"
    with pytest.raises(ConfigError, match="tokens is 0"):
        expert_gemms(MI300X, base, MINIMAX_M3_EP8, 0)


def test_predictions_without_compiled_kernels() -> None:
    found = {prediction.kernels.name: prediction for prediction in predictions([], [])}
    assert set(found) == {"bf16", "w8a16", "w8a8", "block_fp8", "seed-1782"}
    for prediction in found.values():
        assert set(prediction.to_json()["predicted_ms"]) == {point.name for point in BF16_POINTS}
    assert found["w8a16"].milliseconds["8k/c256"] < 0.6 * found["bf16"].milliseconds["8k/c256"]


def test_half_the_bytes_take_half_the_time() -> None:
    wide, narrow = Kernels("wide", 2, 2, "bf16", 16), Kernels("narrow", 1, 1, "bf16", 16)
    free = replace(MI300X, launch_seconds=0.0)
    times = [predicted_ms(free, kernels, MINIMAX_M3_EP8, 64) for kernels in (wide, narrow)]
    assert times[0] / times[1] == pytest.approx(2, rel=0.01)
