"""Dense weights: BF16, FP16 or FP32, row-major."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from epfuse.arguments import checks_enums
from epfuse.config import WeightFormat
from epfuse.errors import DtypeError, LayoutError, ShapeError
from epfuse.operands import require_plain
from epfuse.weights.projections import Forms, Part, Projections

DENSE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class DenseExperts(Projections[torch.Tensor]):
    """Plain tensors, contiguous, both in one dtype."""

    stack: ClassVar[type[torch.Tensor]] = torch.Tensor
    forms: ClassVar[Forms] = {WeightFormat.DENSE: None}

    def check(self) -> None:
        """Plain, of three dimensions, of a dense dtype, contiguous."""
        for name, w, letters in (("w13", self.w13, "[L, 2I, H]"), ("w2", self.w2, "[L, H, I]")):
            require_plain(name, w)
            if w.dim() != 3:
                raise ShapeError(f"{name} has shape {tuple(w.shape)}; it must be three-dimensional: {letters}")
            if w.dtype not in DENSE_DTYPES:
                raise DtypeError(f"{name} has dtype {w.dtype}; it must be bfloat16, float16 or float32")
            if not w.is_contiguous():
                raise LayoutError(
                    f"{name} has strides {w.stride()}; it must be contiguous (call .contiguous() at load)"
                )

    @classmethod
    def of_checked(cls, w13: torch.Tensor, w2: torch.Tensor) -> Self:
        """Of tensors that were checked when they made such experts before, and have the same sizes still."""
        found = cls.__new__(cls)
        vars(found).update(w13=w13, w2=w2)
        return found

    @classmethod
    @checks_enums
    def parts(cls, form: WeightFormat, size: tuple[int, int, int], dtype: torch.dtype) -> tuple[Part, ...]:
        """The matrices themselves."""
        return ((size, dtype),)

    @classmethod
    def rebuilt(cls, tensors: Sequence[torch.Tensor], hidden: int, intermediate: int) -> Self:
        """The two tensors."""
        return cls(*tensors)
