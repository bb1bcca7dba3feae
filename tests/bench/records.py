"""Records that tests share."""

from __future__ import annotations

from dataclasses import replace

from epfuse.bench.contender import Absent, ContenderKind
from epfuse.bench.layers import LAYERS
from epfuse.bench.measure import Timing
from epfuse.bench.record import BenchRecord, BenchRow
from epfuse.bench.roofline import MatrixOperand, Roof, Roofs

ROOFS = Roofs(
    Roof(3e12, "a kernel that reads 1 GiB", 0.01),
    {
        MatrixOperand.BF16: Roof(8e14, "torch.matmul"),
        MatrixOperand.FP8: Roof(None, "not here"),
        MatrixOperand.FP32: Roof(5e13, "x"),
    },
)


def timing(median: float, spread: float = 1.0) -> Timing:
    """Quartiles ``spread`` apart, around ``median``."""
    half = spread / 2
    return Timing(median, median - half, median + half, median - spread, median + spread, 15, 200, "graph")


def row(
    contender: str = "w8a16",
    tokens: int = 64,
    us: float | None = 300.0,
    kind: ContenderKind = ContenderKind.PATH,
    weights: str = "fragment",
    routing: str = "uniform",
    spread: float = 1.0,
    **changes: object,
) -> BenchRow:
    """One row whose floor is 200 us."""
    made = BenchRow(
        contender=contender,
        weights=weights,
        kind=kind,
        routing=routing,
        tokens=tokens,
        rows=32.0,
        active_experts=14.0,
        weight_bytes=6e8,
        flops=3.6e9,
        floor_us=200.0,
        floor_bound="memory",
        variants=2,
        rotated_bytes=9e8,
        error_limit=4e-3,
        block_m=16,
        relative_error=3e-3,
        time=None if us is None else timing(us, spread),
        failure=None if us is not None else "RuntimeError: out of memory",
    )
    return replace(made, **changes)


def record(*rows: BenchRow, **changes: object) -> BenchRecord:
    """A record of MiniMax-M3 on a GPU of an invented name."""
    made = BenchRecord(
        layer=LAYERS["minimax-m3-ep8"],
        device={"type": "cuda", "name": "GPU 9000", "target": "sm_90", "compute_units": 132},
        roofs=ROOFS,
        rows=list(rows),
        absent=[Absent("vllm", "the package vllm is not installed")],
        notes={"torch grouped_mm": "plain PyTorch"},
        run={"command": "epfuse bench", "date": "2026-01-02T03:04:05+00:00", "seed": 0, "clocks": {}, "versions": {}},
    )
    return replace(made, **changes)


def peer(name: str, us: float | None, tokens: int = 64, **changes: object) -> BenchRow:
    """A peer's row."""
    return row(name, tokens, us, ContenderKind.PEER, "bf16", **changes)
