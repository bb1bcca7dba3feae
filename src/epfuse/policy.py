"""The oracle: which path a call takes, on which of the weights that are kept, with which tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from epfuse.config import LayerShape, Path, WeightFormat
from epfuse.errors import UnsupportedTarget
from epfuse.stages.tiles import LayerTiles, rows_per_expert, tiles_for
from epfuse.target import Target

GPU_FORMATS: dict[Path, tuple[WeightFormat, ...]] = {
    Path.W8A16: (WeightFormat.FRAGMENT, WeightFormat.MXFP8),
    Path.BF16: (WeightFormat.DENSE,),
}
"""The paths of a GPU in the order of preference, and the weights that each can read, best first."""


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
) -> Decision:
    """Resolve AUTO, then choose weights and tiles.

    Args:
        path: what the caller asked for.
        target: where it runs.
        shape: the layer's sizes.
        tokens: T.
        formats: the weights that are kept.
        dtype: of the activations.

    Raises:
        UnsupportedTarget: ``target`` can't run ``path`` on such weights; the message names what it can run.
    """
    runs = [p for p, read in GPU_FORMATS.items() if formats.intersection(read)] if target.is_gpu else []
    runs.append(Path.REFERENCE)
    if path is Path.AUTO:
        path = runs[0]
    if path not in runs:
        kept = ", ".join(sorted(form.value for form in formats))
        raise UnsupportedTarget(
            f"path {path.value!r} has no kernel for {target.value} with weights in {kept}; it can run"
            f" {', '.join(p.value for p in runs)}"
        )
    if path is Path.REFERENCE:
        return Decision(path)
    weights = next(form for form in GPU_FORMATS[path] if form in formats)
    return Decision(path, weights, tiles_for(target, weights, shape, dtype, rows_per_expert(tokens, shape)))
