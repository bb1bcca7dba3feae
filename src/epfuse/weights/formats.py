"""All formats of expert weights. A new one is a line in `epfuse.config.WeightFormat` and a file of its name here."""

from __future__ import annotations

import math
from importlib import import_module

import torch

from epfuse.config import WeightFormat
from epfuse.target import Target
from epfuse.weights.projections import AnyProjections, Projections

SECOND_NAME = "_fnuz"
"""Ends the name of a format that differs from another one only by E4M3FNUZ in place of E4M3FN: one file has both."""


def _class_of(form: WeightFormat) -> type[AnyProjections]:
    module = import_module(f"epfuse.weights.{form.value.removesuffix(SECOND_NAME)}")
    classes = [one for one in vars(module).values() if isinstance(one, type) and issubclass(one, Projections)]
    (found,) = [one for one in classes if form in getattr(one, "forms", ())]
    return found


FORMAT_OF: dict[WeightFormat, type[AnyProjections]] = {form: _class_of(form) for form in WeightFormat}

FORMATS: tuple[type[AnyProjections], ...] = tuple(dict.fromkeys(FORMAT_OF.values()))
"""The reference reads the first one that a layer keeps."""

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
