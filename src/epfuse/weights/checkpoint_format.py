"""The numbers that checkpoints have for experts."""

from __future__ import annotations

import enum


class Checkpoint(enum.Enum):
    """The numbers that a checkpoint has for its experts."""

    BF16 = "bf16"
    MXFP8 = "mxfp8"
    MXFP4 = "mxfp4"
    """E2M1 values with a scale per 32: every one is an E4M3 value with another scale, so MXFP8 holds them exactly."""
    BLOCK_FP8 = "block_fp8"
    """E4M3 values with a float32 scale per block of 128x128."""
