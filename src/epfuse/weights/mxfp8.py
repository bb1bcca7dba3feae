"""MXFP8 weights, as checkpoints have them: row-major. What a GPU reads faster is made from them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from epfuse.arguments import checks_enums
from epfuse.config import Path, WeightFormat
from epfuse.errors import ConfigError
from epfuse.numerics.mxfp8 import BLOCK, MXFP8
from epfuse.target import Target
from epfuse.weights.fragment import FragmentExperts, check_packable, pack
from epfuse.weights.panels import RowOrder
from epfuse.weights.projections import E4M3Projections, Forms, Part, Projections
from epfuse.weights.row_fp8 import RowFP8Experts, pack_rows

log: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MXFP8Experts(E4M3Projections[MXFP8]):
    """E4M3 values with an E8M0 byte for 32 of them."""

    stack: ClassVar[type[MXFP8]] = MXFP8
    forms: ClassVar[Forms] = {
        WeightFormat.MXFP8: None,
        WeightFormat.MXFP8_FNUZ: Target.GFX942,
    }

    @classmethod
    @checks_enums
    def parts(cls, form: WeightFormat, size: tuple[int, int, int], dtype: torch.dtype) -> tuple[Part, ...]:
        """Values, and a scale byte for 32."""
        return (size, cls.codes(form)), ((*size[:2], size[2] // BLOCK), torch.uint8)

    @classmethod
    def of_mxfp8(cls, w13: MXFP8, w2: MXFP8) -> Self:
        """A copy."""
        return cls(*(MXFP8(*(part.clone() for part in stack.tensors())) for stack in (w13, w2)))

    @checks_enums
    def prepared(self, target: Target, path: Path) -> Projections[Any]:
        """Hopper's orders: one scale a row for W8A8, fragments for every other path.

        The kernels that read them want a gate: weights without one stay as they are.
        """
        if target is not Target.SM90:
            return super().prepared(target, path)
        if self.inputs != 2:
            return self
        made: Projections[Any]
        if path is Path.W8A8:
            made = RowFP8Experts(pack_rows(self.w13, RowOrder.GATE_UP), pack_rows(self.w2, RowOrder.PLAIN))
        else:
            try:
                for stack in (self.w13, self.w2):
                    check_packable(stack)
            except ConfigError as reason:
                log.warning("MXFP8 weights stay in checkpoint order: %s", reason)
                return self
            made = FragmentExperts(pack(self.w13, RowOrder.GATE_UP), pack(self.w2, RowOrder.PLAIN))
        for stack in (self.w13, self.w2):  # whichever's memory was taken: half a layer is of no use
            stack.consume(made.form.value)
        return made
