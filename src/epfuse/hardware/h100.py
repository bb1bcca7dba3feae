"""The time model held against this package's own measurements on an H100.

Each point is the two expert GEMMs of one layer of MiniMax-M3 on one of 8 ranks, each alone in a CUDA graph, with the
tile that did best: NVIDIA H100 80GB HBM3, torch 2.11, triton 3.6, 2026-11-24; `w8a16` above 1024 tokens 2026-11-25
(docs/notebook/performance.md). At these token counts the routing that was drawn had as many active experts as a
balanced router is expected to have.
"""

from __future__ import annotations

from dataclasses import replace

from epfuse.config import MINIMAX_M3_EP8
from epfuse.hardware.time_model import PATHS, Comparison, Machine, MeasuredTime, compare

H100 = Machine(
    name="H100 80GB HBM3",
    memory_bandwidth=3.35e12,
    eta=0.911,
    matrix_flops={"bf16": 790e12, "fp8": 1400e12},
    launch_seconds=6.1e-6,
    simds=132 * 4,
    clock_hz=1.755e9,
    source="peak bandwidth: NVIDIA H100 SXM data sheet; bf16 FLOP/s and clock: measured on such a card; fp8 FLOP/s: not"
    " measured; eta and launch_seconds: `calibrate` on the points of at most 1024 tokens",
)
FITTED_TOKENS = 1024
"""Up to here the layer is bound by memory, and the points were used to fit eta and launch_seconds."""

# path, tokens, block_m, microseconds of gate_up and of down
MEASURED = (
    ("w8a16", 64, 8, 183.4, 92.2),
    ("w8a16", 256, 16, 209.7, 105.6),
    ("w8a16", 512, 32, 213.0, 107.6),
    ("w8a16", 1024, 64, 220.7, 116.0),
    ("w8a16", 2048, 80, 224.6, 121.1),
    ("w8a16", 8192, 144, 565.6, 295.6),
    ("bf16", 64, 16, 350.1, 174.7),
    ("bf16", 256, 16, 400.3, 200.6),
    ("bf16", 512, 32, 406.7, 206.7),
    ("bf16", 1024, 64, 408.7, 206.9),
    ("bf16", 2048, 128, 456.0, 229.5),
    ("bf16", 8192, 128, 671.2, 360.3),
)


def measured() -> list[MeasuredTime]:
    """The points, as the model takes them."""
    return [
        MeasuredTime(f"T={tokens}", replace(PATHS[path], block_m=block_m), tokens, (gate_up + down) / 1e3)
        for path, tokens, block_m, gate_up, down in MEASURED
    ]


def h100() -> list[Comparison]:
    """Every point beside what the model says of it."""
    return compare(H100, MINIMAX_M3_EP8, measured())
