"""Which kernels each target has, and the weights that they read."""

from __future__ import annotations

from epfuse.arguments import checks_enums
from epfuse.config import Combine, Path, WeightFormat
from epfuse.target import Target

READABLE: dict[Target, dict[Path, tuple[WeightFormat, ...]]] = {
    Target.CPU: {},
    Target.SM90: {
        Path.W8A16: (WeightFormat.FRAGMENT, WeightFormat.MXFP8),
        Path.BF16: (WeightFormat.DENSE,),
        Path.W8A8: (WeightFormat.ROW_FP8, WeightFormat.MXFP8),
        Path.BLOCK_FP8: (WeightFormat.BLOCK_FP8,),
    },
    Target.GFX942: {
        Path.W8A16: (WeightFormat.MXFP8_FNUZ, WeightFormat.MXFP8),
        Path.BF16: (WeightFormat.DENSE,),
        Path.W8A8: (WeightFormat.MXFP8_FNUZ,),
        Path.BLOCK_FP8: (WeightFormat.BLOCK_FP8_FNUZ,),
    },
    Target.GFX950: {
        Path.W8A16: (WeightFormat.MXFP8,),
        Path.BF16: (WeightFormat.DENSE,),
        Path.W8A8: (WeightFormat.MXFP8,),
        Path.BLOCK_FP8: (WeightFormat.BLOCK_FP8,),
    },
}
"""The kernels of each target in the order in which AUTO prefers them, and the weights that each reads, best first.

FP8 activations come last: AUTO gives up accuracy only where the weights leave no other choice.
"""

FP8_PATHS = frozenset({Path.W8A8, Path.BLOCK_FP8})
"""Paths that quantise the activations; the only ones that can sum routes by atomics."""


@checks_enums
def readable_formats(target: Target, path: Path, combine: Combine) -> tuple[WeightFormat, ...]:
    """The weights that a path's kernels read and sum routes of so, best first; none where there is no kernel."""
    formats = READABLE[target].get(path, ())
    if combine is Combine.DETERMINISTIC:
        return formats
    # rows beside ROW_FP8 lie packed, and are summed without atomics
    return tuple(form for form in formats if path in FP8_PATHS and form is not WeightFormat.ROW_FP8)
