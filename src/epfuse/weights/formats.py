"""All formats of expert weights: a new one is a line here."""

from __future__ import annotations

import math

import torch

from epfuse.config import WeightFormat
from epfuse.target import Target
from epfuse.weights.block_fp8 import BlockFP8Experts
from epfuse.weights.dense import DenseExperts
from epfuse.weights.fragment import FragmentExperts
from epfuse.weights.mxfp8 import MXFP8Experts
from epfuse.weights.projections import AnyProjections
from epfuse.weights.row_fp8 import RowFP8Experts

FORMATS: tuple[type[AnyProjections], ...] = (
    MXFP8Experts,
    FragmentExperts,
    BlockFP8Experts,
    DenseExperts,
    RowFP8Experts,  # last: it has lost some bits
)
"""The reference reads the first one that a layer keeps: what the checkpoint had comes first."""

FORMAT_OF: dict[WeightFormat, type[AnyProjections]] = {form: kind for kind in FORMATS for form in kind.forms}

PREPARED_FOR: dict[WeightFormat, Target] = {
    form: target for kind in FORMATS for form, target in kind.forms.items() if target is not None
}
"""The formats that `ExpertWeights.prepare` makes, and the one target whose kernels read each."""


def _bytes_per_weight(form: WeightFormat) -> float:
    size = (1, 1 << 20, 1 << 20)
    parts = FORMAT_OF[form].parts(form, size, torch.bfloat16)
    return sum(math.prod(part) * dtype.itemsize for part, dtype in parts) / math.prod(size)


BYTES_PER_WEIGHT: dict[WeightFormat, float] = {form: _bytes_per_weight(form) for form in FORMAT_OF}
"""Bytes of one weight of a large matrix, its share of the scales included; dense weights are BF16."""
