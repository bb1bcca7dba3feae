"""The vocabulary of a profile: every kernel belongs to one phase of a model step, or is unclassified."""

from __future__ import annotations

import enum


class Phase(enum.Enum):
    """What a kernel works for, in the order of a step. The values are the names in rules, JSON and tables."""

    INPUT = "input"
    """Before the first layer: embedding, positions, step metadata."""
    NORM = "norm/RoPE/cache"
    PROJECTION = "attention projection"
    SPARSE_INDEX = "sparse index"
    ATTENTION = "attention"
    ROUTER = "router"
    PREPARE = "MoE prepare/align/sort"
    GEMM1 = "expert GEMM 1"
    ACTIVATION = "activation"
    GEMM2 = "expert GEMM 2"
    COMBINE = "combine"
    SHARED_EXPERT = "shared expert"
    DENSE_FFN = "dense FFN"
    COLLECTIVES = "collectives"
    """Communication between GPUs. It spins while it waits for the others, so its time is not all work."""
    OUTPUT = "output"
    """After the last layer: final norm's input gathering, logits, sampling."""


EXPERT_PHASES = (Phase.GEMM1, Phase.ACTIVATION, Phase.GEMM2)
"""What a rank's expert weights are read in."""
