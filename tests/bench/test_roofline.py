from __future__ import annotations

import pytest
import torch

from epfuse.bench.measure import Sampling
from epfuse.bench.roofline import CallWork, Floor, MatrixOperand, Roof, Roofs, floor_of
from epfuse.bench.roofs import measure_roofs
from tests.bench.records import ROOFS


@pytest.mark.parametrize(
    ("work", "floor"),
    [
        (CallWork(3e9, 8e10, MatrixOperand.BF16), Floor(1e-3, "memory")),
        (CallWork(3e9, 8e12, MatrixOperand.BF16), Floor(1e-2, "matmul")),
        (CallWork(3e9, 8e12, MatrixOperand.FP8), Floor(1e-3, "memory")),  # a rate that is not known bounds nothing
    ],
)
def test_floor(work: CallWork, floor: Floor) -> None:
    found = floor_of(work, ROOFS)
    assert found.seconds == pytest.approx(floor.seconds)
    assert found.bound == floor.bound


def test_floor_without_roofs_is_zero() -> None:
    assert floor_of(CallWork(1.0, 1.0, MatrixOperand.BF16), Roofs(Roof(None, ""))).seconds == 0.0


def test_roofs_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epfuse.bench.roofs.CPU_COPY_BYTES", 1 << 20)
    monkeypatch.setattr("epfuse.bench.roofs.CPU_MATRIX", 64)
    roofs = measure_roofs(torch.device("cpu"), Sampling(samples=2, seconds=1e-4))
    assert roofs.read.rate is not None
    assert 1e8 < roofs.read.rate < 1e13
    assert roofs.matmul[MatrixOperand.BF16].rate
    assert roofs.matmul[MatrixOperand.FP32].rate
    assert roofs.matmul[MatrixOperand.FP8] == Roof(None, "no FP8 path runs on a CPU")
