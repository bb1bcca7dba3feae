"""Measurements that others have published of MiniMax-M3's expert GEMMs on MI300X: what the time model is held against.

Source: SemiAnalysisAI/InferenceX, ``experimental/minimax_m3_mi300x_profile.md`` (2026-06-15) and pull request 1782: a
vLLM nightly (4a560dd8) with its BF16 experts on MI300X, eager decode, rank 0 of 8, 57 MoE layers; the time is that of
GEMM1 and GEMM2 of one decode step. The block-FP8 figure is from the same authors, later.
"""

from __future__ import annotations

from dataclasses import dataclass

MOE_LAYERS = 57
"""Layers of MiniMax-M3 that have experts."""


@dataclass(frozen=True)
class ProfilePoint:
    """One point of the profile.

    Attributes:
        name: context length and concurrency.
        tokens: T of a decode step. At c256 the source counts 216 active tokens; at c1 and c16 it gives no count, and
            the concurrency is taken.
        expert_gemms_ms: both GEMMs of the 57 layers, milliseconds a step, measured.
    """

    name: str
    tokens: int
    expert_gemms_ms: float


BF16_POINTS = (
    ProfilePoint("1k/c1", 1, 3.10),
    ProfilePoint("1k/c16", 16, 7.32),
    ProfilePoint("1k/c256", 216, 30.31),
    ProfilePoint("8k/c1", 1, 3.15),
    ProfilePoint("8k/c16", 16, 8.06),
    ProfilePoint("8k/c256", 216, 28.10),
)
BLOCK_FP8_POINT = ProfilePoint("8k/c256", 216, 17.361)
"""128 x 128 block FP8 weights and activations."""
