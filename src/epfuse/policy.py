"""The oracle: which path a call takes, on which of the weights that are kept, with which tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from epfuse.config import Combine, LayerShape, Path, WeightFormat
from epfuse.errors import UnsupportedTarget
from epfuse.stages.tiles import LayerTiles, rows_per_expert, tiles_for
from epfuse.stages.tiles_fp8 import fp8_tiles_for
from epfuse.target import Target

READABLE: dict[Target, dict[Path, tuple[WeightFormat, ...]]] = {
    Target.CPU: {},
    Target.SM90: {
        Path.W8A16: (WeightFormat.FRAGMENT, WeightFormat.MXFP8),
        Path.BF16: (WeightFormat.DENSE,),
        Path.W8A8: (WeightFormat.MXFP8,),
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


@dataclass(frozen=True)
class Decision:
    """What one call will do.

    Attributes:
        path: never AUTO.
        weights: the format that the kernels read; None on the reference path.
        tiles: tiles of the kernels; None on the reference path.
    """

    path: Path
    weights: WeightFormat | None = None
    tiles: LayerTiles | None = None


def decide(
    path: Path,
    target: Target,
    shape: LayerShape,
    tokens: int,
    formats: frozenset[WeightFormat] = frozenset({WeightFormat.DENSE}),
    dtype: torch.dtype = torch.bfloat16,
    combine: Combine = Combine.DETERMINISTIC,
) -> Decision:
    """Resolve AUTO, then choose weights and tiles.

    Args:
        path: what the caller asked for.
        target: where it runs.
        shape: the layer's sizes.
        tokens: T.
        formats: the weights that are kept.
        dtype: of the activations.
        combine: how routes are summed; ATOMIC leaves the paths with FP8 activations.

    Raises:
        UnsupportedTarget: ``target`` can't run ``path`` so; the message names what it can run.
    """
    kernels = [
        candidate
        for candidate, readable in READABLE[target].items()
        if formats.intersection(readable)
        and (candidate is Path.BF16 or dtype == torch.bfloat16)
        and (candidate in FP8_PATHS or combine is Combine.DETERMINISTIC)
    ]
    runs = [*kernels, Path.REFERENCE] if combine is Combine.DETERMINISTIC else kernels
    if path is Path.AUTO and (kernels or not target.is_gpu):  # a GPU never falls back to plain PyTorch by itself
        path = runs[0] if runs else path
    if path not in runs:
        raise UnsupportedTarget(
            f"path {path.value!r} has no kernel for {target.value} with {_described(formats, dtype, combine)}; it can"
            f" run {', '.join(p.value for p in runs) or 'nothing so'}"
        )
    if path is Path.REFERENCE:
        return Decision(path)
    weights = next(form for form in READABLE[target][path] if form in formats)
    rows = rows_per_expert(tokens, shape)
    if path in FP8_PATHS:
        return Decision(path, weights, fp8_tiles_for(target, rows))
    return Decision(path, weights, tiles_for(target, weights, shape, dtype, rows))


def _described(formats: frozenset[WeightFormat], dtype: torch.dtype, combine: Combine) -> str:
    """What of a call decides which paths can run."""
    text = f"weights in {', '.join(sorted(form.value for form in formats))}"
    if dtype != torch.bfloat16:
        text += f", activations in {str(dtype).removeprefix('torch.')}"
    if combine is not Combine.DETERMINISTIC:
        text += f", combine {combine.value!r}"
    return text
