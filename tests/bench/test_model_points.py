from __future__ import annotations

import pytest

from epfuse.bench.model_points import measurements, routing_of
from epfuse.errors import ConfigError
from epfuse.hardware.time_model import MI300X, compare
from tests.bench.records import peer, record, row

MEASURED = record(
    row(tokens=256, us=315.0),
    row("bf16", tokens=256, us=601.0, weights="dense", block_m=16),
    row("w8a8 atomic", tokens=256),
    row(tokens=16, us=None),
    row(tokens=16, routing="zipf:1.2"),
    peer("vLLM Marlin", 344.0, tokens=256),
)


def test_points_are_the_timed_rows_of_the_models_paths() -> None:
    found = measurements(MEASURED)
    assert [(m.name, m.kernels.name, m.kernels.block_m, m.tokens, m.milliseconds) for m in found] == [
        ("w8a16 fragment, T=256", "w8a16", 16, 256, pytest.approx(0.315)),
        ("bf16 dense, T=256", "bf16", 16, 256, pytest.approx(0.601)),
    ]
    comparisons = compare(MI300X, MEASURED.layer.shape, found, routing_of("uniform"))
    assert all(comparison.predicted_ms > 0 for comparison in comparisons)


def test_routings() -> None:
    assert routing_of("uniform").skew == 0.0
    assert routing_of("zipf:1.2").skew == 1.2
    assert [point.tokens for point in measurements(MEASURED, "zipf:1.2")] == [16]
    with pytest.raises(ConfigError, match="knows uniform and zipf"):
        routing_of("all-to:2")
